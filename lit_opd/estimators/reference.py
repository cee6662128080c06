"""Estimators that know a third, reference model, as what the teacher comes from or what the student should stay near.

>>> import torch
>>> p, q, r = (torch.tensor([x]).log() for x in (0.5, 0.25, 0.125))
>>> tokens = TokenBatch(p, q, p, torch.tensor([True]), reference_logps_BT=r)
>>> stable_opd(tokens, reference_weight=0.5).loss_BT / p  # log(p / q) + 0.5 log(p / r), in nats
tensor([1.3863])
"""

from __future__ import annotations

from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import log_ratio, score_function
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import WEIGHT, allow, at_least
from lit_opd.functional.ratios import importance_ratio, truncated_ratio
from lit_opd.types import Estimate, TokenBatch

__all__ = ["exopd", "stable_opd"]


def _reference_logps(tokens: TokenBatch) -> Tensor:
    assert tokens.reference_logps_BT is not None
    return upcast(tokens.reference_logps_BT)


@register_estimator(
    "exopd",
    needs="token+reference",
    source="G-OPD and ExOPD, arXiv:2602.12125; limits in arXiv:2605.08737",
    check=allow(extrapolation=WEIGHT, max_ratio=at_least(1)),
    at_equal="never",
    corrects=True,
    variants=(
        Variant({"extrapolation": 1.0}, "on-policy `token`", target="reverse_kl", unbiased=True, at_equal="sample"),
        Variant({"extrapolation": 0.0}, "the teacher drops out: towards the reference"),
    ),
)
def exopd(tokens: TokenBatch, *, extrapolation: float = 1.25, max_ratio: float = 5.0) -> Estimate:
    """Extrapolate beyond the teacher by making the student's gain over a reference that of the teacher times a factor.

    Formula, with p student, q teacher, r reference, w_t = min(p / sampler, max_ratio), all detached:
    loss_t = w_t [log p(y_t) - log r(y_t) - extrapolation (log q(y_t) - log r(y_t))] log p(y_t). The optimum at fixed
    prefixes is proportional to r (q / r)^extrapolation: short of the teacher below 1, beyond it above.

    Args:
        tokens: student, teacher, sampler and reference log-probabilities, [B, T] or [N], nats. The reference is the
            student as it was at first, or the teacher as it was before its own reinforcement learning.
        extrapolation: 1 for plain distillation.
        max_ratio: the largest importance ratio let through.
    """
    excess = log_ratio(tokens) - (extrapolation - 1) * (upcast(tokens.teacher_logps_BT) - _reference_logps(tokens))
    ratio = importance_ratio(tokens.student_logps_BT.detach(), tokens.sampler_logps_BT)
    weight = truncated_ratio(ratio, max_ratio)
    return score_function(tokens, weight * excess, clipped=weight != ratio)


@register_estimator(
    "stable_opd",
    needs="token+reference",
    source="StableOPD, arXiv:2604.08527 (its divergence constraint, without golden rollouts)",
    check=allow(reference_weight=WEIGHT),
    at_equal="never",
    variants=(
        Variant({"reference_weight": 0.0}, "it is `token`", target="reverse_kl", unbiased=True, at_equal="sample"),
    ),
)
def stable_opd(tokens: TokenBatch, *, reference_weight: float = 0.1) -> Estimate:
    """Add some reverse KL to a reference model, which holds the student back from running off.

    Formula, with p student, q teacher, r reference, detached:
    loss_t = [log p(y_t) - log q(y_t) + reference_weight (log p(y_t) - log r(y_t))] log p(y_t). The paper also trains on
    golden rollouts, which are other data: `supervised` in a `mix`. The default weight is not the paper's.

    Args:
        tokens: student, teacher and reference log-probabilities, [B, T] or [N], nats.
        reference_weight: of the reverse KL to the reference.
    """
    drift = upcast(tokens.student_logps_BT) - _reference_logps(tokens)
    return score_function(tokens, log_ratio(tokens) + reference_weight * drift)
