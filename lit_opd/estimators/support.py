"""Estimators that compare student and teacher on K tokens a position."""

from __future__ import annotations

from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.divergences import renormalise, reverse_kl
from lit_opd.functional.precision import upcast
from lit_opd.types import Estimate, TokenBatch


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 2:
        raise ValueError(f"k must be a whole number of at least 2, found {k!r}; renormalised over one token, any two "
                         "distributions are equal and the gradient is zero")  # fmt: skip


@register_estimator(
    "teacher_topk",
    family="token",
    target="reverse_kl",
    unbiased=False,
    needs="support",
    source="arXiv:2603.25562, eq. 6-8 (local support matching)",
    check=_check_k,
)
def teacher_topk(tokens: TokenBatch, *, k: int = 16) -> Estimate:
    """Local support matching: reverse KL on the teacher's K most probable tokens, both sides renormalised.

    Formula, on the support S with p' and q' the two distributions renormalised over it: loss_t = sum over S of
    p' (log p' - log q'). No sampling noise; blind to how much mass the student puts outside S, and to K = 1. Special
    tokens are left out by `estimator.masked_tokens`, before any estimator sees them.

    Args:
        tokens: support log-probabilities under the full softmax, [..., K], nats.
        k: size of the support.

    Returns:
        Loss, and the sampled log-ratio as KL estimate: the renormalised value says nothing of the tokens outside S.
    """
    assert tokens.student_support_logps_BTK is not None
    assert tokens.teacher_support_logps_BTK is not None
    student_logps = renormalise(tokens.student_support_logps_BTK)
    teacher_logps = renormalise(tokens.teacher_support_logps_BTK)
    log_ratio = upcast(tokens.student_logps_BT).detach() - upcast(tokens.teacher_logps_BT)
    return Estimate(loss_BT=reverse_kl(student_logps, teacher_logps), kl_BT=log_ratio)
