"""Weightings by 1 and 0, which keep the share of each completion's tokens that matters most.

Tokens compete within their completion, so that a selection does not depend on what else is in the batch. Of equal ones
the earlier is kept, and of every completion at least one.

>>> scores, mask = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
>>> keep_top(scores, mask, share=0.67)
tensor([[ True, False,  True, False]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_weighting
from lit_opd.estimators.weighted import weights_where
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import POSITIVE_SHARE, allow
from lit_opd.types import TokenBatch

__all__ = ["entropy_top", "keep_top", "tip"]

_EVERYTHING = (Variant({"share": 1.0, "base": "token"}, "every token is kept", unbiased=True),)


def keep_top(scores_BT: Tensor, mask_BT: Tensor, share: float) -> Tensor:
    """Keep the counted tokens that have the largest scores of their row.

    Of n counted tokens round(share n) are kept (to even at halves), but at least one.
    """
    order_BT = torch.where(mask_BT, scores_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BT = order_BT.argsort(dim=1)
    kept_B1 = (share * mask_BT.sum(1, keepdim=True).double()).round().clamp(min=1)
    return mask_BT & (rank_BT < kept_B1)


@register_weighting(
    "entropy_top",
    target="reverse_kl",
    needs="token+entropy",
    source="option of the code of arXiv:2603.25562 (top 20 %); arXiv:2604.14084 (50 %)",
    check=allow(share=POSITIVE_SHARE),
    variants=_EVERYTHING,
)
def entropy_top(tokens: TokenBatch, *, share: float = 0.2) -> Tensor:
    """Keep the tokens at which the student is least decided, so that confident mistakes are never corrected.

    Formula: w_t = 1 at the share of each completion's counted tokens with the largest student entropy, else 0.

    Args:
        tokens: the student's entropies, [B, T], nats, and the mask.
        share: of the counted tokens, in (0, 1].
    """
    assert tokens.student_entropy_BT is not None
    return weights_where(tokens, keep_top(upcast(tokens.student_entropy_BT), tokens.mask_BT, share))


@register_weighting(
    "tip",
    target="reverse_kl",
    needs="token+entropy+kl",
    source="TIP, arXiv:2604.14084 (soft OR), scaled over the completion instead of the batch",
    check=allow(share=POSITIVE_SHARE),
    variants=_EVERYTHING,
)
def tip(tokens: TokenBatch, *, share: float = 0.5) -> Tensor:
    """Keep the tokens at which the student is undecided, or decided and far from the teacher.

    Formula, with h and k the student's entropy and the exact reverse KL, each scaled to [0, 1] between the smallest and
    the largest of the completion: w_t = 1 at the share of counted tokens with the largest h + k - h k, else 0. Their
    product would miss the confident mistakes, where h is 0.

    Args:
        tokens: the student's entropies and the exact KL, [B, T], nats, and the mask.
        share: of the counted tokens, in (0, 1].
    """
    assert tokens.student_entropy_BT is not None
    assert tokens.kl_BT is not None
    entropy_BT, kl_BT = (_scaled(upcast(x), tokens.mask_BT) for x in (tokens.student_entropy_BT, tokens.kl_BT))
    return weights_where(tokens, keep_top(entropy_BT + kl_BT - entropy_BT * kl_BT, tokens.mask_BT, share))


def _scaled(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Map the counted values of each row to [0, 1], or to 0 where all are equal."""
    low_B1 = torch.where(mask_BT, values_BT, torch.inf).amin(1, keepdim=True)
    span_B1 = torch.where(mask_BT, values_BT, -torch.inf).amax(1, keepdim=True) - low_B1
    return torch.where(mask_BT & (span_B1 > 0), (values_BT - low_B1) / span_B1, 0.0)
