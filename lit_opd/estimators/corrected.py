"""Estimators that weigh tokens by student over sampler, for samples that are stale, tempered or cut off.

The ratio is the token's own: it corrects what is sampled at a prefix, not how often the sampler comes there. What they
estimate is the local reverse KL at the sampler's prefixes.

>>> p, q, mu = torch.tensor([[[0.5, 0.5], [0.25, 0.25], [0.05, 0.25]]]).log().unbind(1)  # 10 and 2 times rarer once
>>> tokens = TokenBatch(p, q, mu, mask_BT=torch.ones_like(p).bool())
>>> estimate = importance_reverse_kl(tokens, correction="truncated", cap=5.0)
>>> estimate.loss_BT / p / estimate.kl_BT, estimate.clipped_BT
(tensor([[5., 2.]]), tensor([[ True, False]]))
"""

from __future__ import annotations

import torch

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import k3, log_ratio, score_function
from lit_opd.functional.ranges import POSITIVE, POSITIVE_SHARE, Range, allow, one_of
from lit_opd.functional.ratios import banded_ratio, importance_ratio, one_sided_ratio, truncated_ratio
from lit_opd.types import Estimate, TokenBatch

__all__ = ["CORRECTIONS", "importance_k3", "importance_reverse_kl", "ppo_reverse_kl"]

CORRECTIONS = ("full", "truncated", "band", "one_sided")


@register_estimator(
    "importance_k3",
    target="reverse_kl",
    unbiased=True,
    source="as described in DeepSeek-V3.2, arXiv:2512.02556",
    corrects=True,
)
def importance_k3(tokens: TokenBatch) -> Estimate:
    """Differentiate k3 times student over sampler, which gives the reverse KL again, on stale samples too.

    Formula, with mu the sampler: loss_t = p/mu (exp(-d_t) - 1 + d_t). Its expectation over mu is the exact KL at the
    position, and the gradient, that of the KL, (p/mu) d_t grad log p(y_t): what the ratio adds turns the forward KL of
    `k3_loss` around. Where the log-ratio of student over sampler leaves [-20, 20] the ratio has no gradient.

    Returns:
        Loss, and the weighted k3 estimate of the KL, same shape.
    """
    ratio = importance_ratio(tokens.student_logps_BT, tokens.sampler_logps_BT)
    loss = ratio * k3(log_ratio(tokens))
    return Estimate(loss_BT=loss, kl_BT=loss.detach())


def _check_correction(correction: str, cap: float, low: float, high: float, max_drop: float) -> None:
    one_of(CORRECTIONS).check("correction", correction)
    Range("be at least 1, the ratio of a fresh sample", lambda value: value >= 1).check("cap", cap)
    POSITIVE_SHARE.check("max_drop", max_drop)
    if not 0 <= low < 1 < high:
        raise ValueError(
            f"low and high must satisfy 0 <= low < 1 < high: 1 is a fresh sample's, found {low} and {high}"
        )


@register_estimator(
    "importance_reverse_kl",
    target="reverse_kl",
    unbiased=True,
    source="truncated as in G-OPD, arXiv:2602.12125; band as in MOPD, arXiv:2601.02780, and Nemotron-Cascade 2, "
    "arXiv:2603.19220; one-sided as in prime-rl",
    check=_check_correction,
    corrects=True,
    variants=tuple(Variant({"correction": name}, "on fresh samples all are the same") for name in CORRECTIONS),
)
def importance_reverse_kl(
    tokens: TokenBatch,
    *,
    correction: str = "truncated",
    cap: float = 5.0,
    low: float = 0.5,
    high: float = 2.0,
    max_drop: float = 0.2,
) -> Estimate:
    """Weigh `token` by student over sampler for stale samples, with a choice of bounds that trade bias for variance.

    Formula, with w_t and d_t detached: loss_t = w_t d_t log p(y_t). w_t is made from the ratio r_t = p(y_t) / mu(y_t)
    of student and sampler. Fresh samples have ratio 1 and all corrections are `token`. On stale ones only `full` is
    unbiased, for the local reverse KL at the sampler's prefixes; the others trade that for bounded weights.

    - `full`: r_t.
    - `truncated`: min(r_t, cap).
    - `band`: r_t where low <= r_t <= high, else 0 (IcePop).
    - `one_sided`: r_t, but 0 where the token's probability has dropped by more than max_drop.

    Args:
        tokens: student, teacher and sampler log-probabilities of the sampled tokens, [B, T] or [N], nats.
        correction: `full`, `truncated`, `band` or `one_sided`.
        cap: largest weight of `truncated`, at least 1.
        low: lower end of `band`, below 1.
        high: upper end of `band`, above 1.
        max_drop: of `one_sided`, a difference of probabilities, above 0.
    """
    ratio = importance_ratio(tokens.student_logps_BT, tokens.sampler_logps_BT)
    weight = ratio
    if correction == "truncated":
        weight = truncated_ratio(ratio, cap)
    elif correction == "band":
        weight = banded_ratio(ratio, low, high)
    elif correction == "one_sided":
        weight = one_sided_ratio(tokens.student_logps_BT, tokens.sampler_logps_BT, max_drop)
    clipped = None if correction == "full" else weight != ratio
    return score_function(tokens, weight * log_ratio(tokens), clipped=clipped)


@register_estimator(
    "ppo_reverse_kl",
    target="reverse_kl",
    unbiased=True,
    source="arXiv:2603.25562, whose training loss this is",
    check=allow(clip_low=POSITIVE_SHARE, clip_high=POSITIVE, dual_clip=Range("be above 1", lambda value: value > 1)),
    corrects=True,
)
def ppo_reverse_kl(
    tokens: TokenBatch, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0
) -> Estimate:
    """Put the log-ratio into PPO's dual-clip surrogate, which stops on stale samples where the student moved enough.

    Formula, with A_t = -d_t detached and r_t = p(y_t) / mu(y_t): loss_t = max(-A_t r_t, -A_t clamp(r_t, 1 - clip_low,
    1 + clip_high)), and where A_t < 0 at most -dual_clip A_t. Fresh samples have ratio 1 and it is `token`; clipped
    ones have no gradient, which biases. The advantage is the present student's; the paper's code keeps the sampler's.

    Args:
        tokens: student, teacher and sampler log-probabilities of the sampled tokens, [B, T] or [N], nats.
        clip_low: how far below 1 the ratio still pushes a token down, to 1.
        clip_high: how far above 1 it still pushes a token up.
        dual_clip: largest ratio with which a token is still pushed down, above 1.
    """
    advantage = -log_ratio(tokens).detach()
    ratio = importance_ratio(tokens.student_logps_BT, tokens.sampler_logps_BT)
    free, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    bounded = torch.maximum(free, clipped)
    loss = torch.where(advantage < 0, torch.minimum(bounded, -dual_clip * advantage), bounded)
    return Estimate(loss_BT=loss, kl_BT=-advantage, clipped_BT=loss != free)
