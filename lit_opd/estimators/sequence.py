"""Estimators whose credit flows to earlier positions."""

from __future__ import annotations

from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.precision import upcast
from lit_opd.functional.returns import return_to_go
from lit_opd.types import Estimate, TokenBatch


def discounted_reverse_kl(tokens: TokenBatch, gamma: float) -> Estimate:
    """Score function weighted by the discounted sum of this and all later log-ratios.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.
        gamma: discount; 0 looks at this token only, 1 at the rest of the sequence.

    Returns:
        Surrogate loss and log-ratio, [B, T].
    """
    student_logps_BT = upcast(tokens.student_logps_BT)
    log_ratio_BT = student_logps_BT.detach() - upcast(tokens.teacher_logps_BT)
    # Masked first: a special token's log-ratio of -58 would leak into every earlier return.
    counted_log_ratio_BT = log_ratio_BT.masked_fill(~tokens.mask_BT, 0.0)
    credit_BT = return_to_go(counted_log_ratio_BT, gamma)
    return Estimate(loss_BT=credit_BT * student_logps_BT, kl_BT=log_ratio_BT)


@register_estimator(
    "sequence",
    family="sequence",
    target="sequence_reverse_kl",
    unbiased=True,
    needs="token",
    source="arXiv:2603.25562, eq. of the causal return; MiniLLM, arXiv:2306.08543",
)
def sequence_reverse_kl(tokens: TokenBatch) -> Estimate:
    """Sequence reverse KL: the score function weighted by the undiscounted return-to-go.

    Formula, with d_i detached: loss_t = (sum over i >= t of d_i) log p(y_t). Its expected gradient is exactly that of
    KL(student || teacher) over whole sequences; its second moment can grow with the fourth power of the length.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.

    Returns:
        Surrogate loss and log-ratio, [B, T].
    """
    return discounted_reverse_kl(tokens, gamma=1.0)
