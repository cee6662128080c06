"""Estimators that need one teacher log-probability a token, each position for itself."""

from __future__ import annotations

from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.precision import upcast
from lit_opd.types import Estimate, TokenBatch


@register_estimator(
    "token",
    family="token",
    target="reverse_kl",
    unbiased=True,
    needs="token",
    source="Thinking Machines, On-Policy Distillation (2025); arXiv:2603.25562, gamma = 0",
)
def sampled_reverse_kl(tokens: TokenBatch) -> Estimate:
    """Sampled reverse KL: the score function weighted by this token's log-ratio.

    Formula, with d_t = log p(y_t) - log q(y_t) detached: loss_t = d_t log p(y_t). Over y_t ~ p its expected gradient is
    that of KL(student || teacher) at the position, with the prefix held fixed. Trades variance for needing only one
    number a token from the teacher.

    Args:
        tokens: student, teacher log-probabilities of the sampled tokens, [B, T] or [N], nats.

    Returns:
        Surrogate loss and the log-ratio (the k1 estimate of the KL), same shape.
    """
    student_logps = upcast(tokens.student_logps_BT)
    log_ratio = student_logps.detach() - upcast(tokens.teacher_logps_BT)
    return Estimate(loss_BT=log_ratio * student_logps, kl_BT=log_ratio)
