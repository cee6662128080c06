"""Estimators that distrust tokens which the teacher finds far less probable than the student.

The log-ratio d of a sampled token is heavy-tailed on one side only: the chance of d < -x is at most exp(-x), whatever
the teacher, while a token that the teacher would never write has any d. All of these bound d from above.

>>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.005]).log()
>>> tokens = TokenBatch(p, q, p, mask_BT=torch.ones_like(p).bool())
>>> estimate = tropd(tokens, trust=2.0)  # the teacher finds the second 100 times less probable
>>> estimate.loss_BT / p, estimate.clipped_BT
(tensor([0.6931, 0.0000]), tensor([False,  True]))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import log_ratio, score_function
from lit_opd.estimators.topk import support_logps
from lit_opd.functional.ranges import POSITIVE_SHARE, Range, allow, one_of, whole
from lit_opd.functional.support import support_divergence
from lit_opd.types import Estimate, TokenBatch

__all__ = ["OUTLIERS", "reopold", "tropd", "tropd_forward"]

OUTLIERS = ("mask", "clip")


_TRUST = Range("be finite and not negative", lambda value: 0 <= value < math.inf, "without a limit it is `token`")


@register_estimator(
    "tropd",
    target="reverse_kl",
    source="as described of TrOPD, arXiv:2606.01249",
    check=allow(trust=_TRUST, outlier=one_of(OUTLIERS, "`tropd_forward` is the third")),
    variants=(
        Variant({"outlier": "clip"}, "the other way with outliers"),
        Variant({"trust": 0.0}, "only tokens that the teacher finds at least as probable"),
    ),
    small={"trust": 0.5},
)
def tropd(tokens: TokenBatch, *, trust: float = 5.0, outlier: str = "mask") -> Estimate:
    """Trust `token` where the teacher finds it not far less probable, and drop or clip the others with a bias.

    Formula, with d_t detached and the region d_t <= trust, which is q/p >= exp(-trust): loss_t = d_t log p(y_t) inside,
    0 (`mask`) or trust x log p(y_t) (`clip`) outside. `mask` never tells the student what the teacher would not write;
    `clip` tells, and bounds how loudly. Both are biased as soon as a token leaves the region.

    Args:
        tokens: student, teacher log-probabilities of the sampled tokens, [B, T] or [N], nats.
        trust: end of the region, nats, 0 or more; by default where arXiv:2603.25562 clips log-ratios, as TrOPD's own is
            not known to us.
        outlier: `mask` or `clip`.
    """
    d = log_ratio(tokens)
    distrusted = d > trust
    outside = 0.0 if outlier == "mask" else trust
    return score_function(tokens, torch.where(distrusted, outside, d), clipped=distrusted)


@register_estimator(
    "tropd_forward",
    target="reverse_kl",
    needs="support",
    source="as described of TrOPD, arXiv:2606.01249",
    check=allow(trust=_TRUST, k=whole()),
    on_policy=True,
    small={"trust": 0.5},
)
def tropd_forward(tokens: TokenBatch, *, trust: float = 5.0, k: int = 16) -> Estimate:
    """Trust `token` inside a region and take the forward KL on the teacher's top K outside, which says what to write.

    Formula, with d_t detached in the first: loss_t = d_t log p(y_t) where d_t <= trust, elsewhere the sum over the
    support S of q (log q - log p). The latter is the part of KL(teacher || student) that S holds, not renormalised.

    Args:
        tokens: sampled and support log-probabilities, the latter under the full softmax, [..., K], nats.
        trust: end of the region as in `tropd`, nats.
        k: size of the support.
    """
    d = log_ratio(tokens)
    distrusted = d > trust
    inside = score_function(tokens, torch.where(distrusted, 0.0, d))
    forward = support_divergence(*support_logps(tokens), divergence="forward_kl", mass="truncate")
    return Estimate(torch.where(distrusted, forward, inside.loss_BT), inside.kl_BT, clipped_BT=distrusted)


_MIXTURE = Range("lie in (0, 0.5]", lambda value: 0 < value <= 0.5, "above, agreement with the teacher is rewarded")


@register_estimator(
    "reopold",
    family="sequence",
    target="reverse_kl",
    needs="token+entropy",
    source="as described of REOPOLD, arXiv:2603.11137",
    check=allow(mixture=_MIXTURE, entropy_share=POSITIVE_SHARE),
    variants=(
        Variant({"mixture": 0.3}, "a higher floor"),
        Variant({"mixture": 0.3, "entropy_share": 0.5}, "half of the tokens"),
    ),
)
def reopold(tokens: TokenBatch, *, mixture: float = 0.2, entropy_share: float = 1.0) -> Estimate:
    """Bound the cost of the tokens where the student is least sure and drop the others, against heavy negatives.

    Formula, with the reward R_t = -d_t detached: loss_t = -max(R_t, log(mixture / (1 - mixture))) log p(y_t) on the
    `entropy_share` of each completion's counted tokens, rounded up, where the student's entropy is largest, and 0 on
    the others, which still count in the average. With all tokens it is `tropd` that clips, at log(1 / mixture - 1).

    Args:
        tokens: sampled log-probabilities and the student's entropy, [B, T], nats, and the mask.
        mixture: sets the floor: -2.2 at 0.1, -1.4 at 0.2, and 0, no negative reward at all, at 0.5, the largest. The
            default is a choice of ours.
        entropy_share: share of tokens kept, above 0; 1 keeps all.
    """
    assert tokens.student_entropy_BT is not None
    ceiling = math.log((1 - mixture) / mixture)
    d_BT = log_ratio(tokens)
    kept_BT = _largest(tokens.student_entropy_BT, tokens.mask_BT, entropy_share)
    cost_BT = torch.where(kept_BT, d_BT.clamp(max=ceiling), 0.0)
    return score_function(tokens, cost_BT, clipped=kept_BT & (d_BT > ceiling))


def _largest(values_BT: Tensor, mask_BT: Tensor, share: float) -> Tensor:
    """Find the largest `share` of a row's counted values, rounded up, and of equal values the first."""
    order_BT = values_BT.masked_fill(~mask_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BT, counted_B1 = order_BT.argsort(dim=1), mask_BT.sum(1, keepdim=True)
    # As quotients: share x count can come out a little above a whole number, and would keep one token more.
    return mask_BT & (rank_BT.double() / counted_B1.clamp(min=1) < share)
