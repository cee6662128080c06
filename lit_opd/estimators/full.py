"""Estimators that compare student and teacher on the whole vocabulary."""

from __future__ import annotations

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.divergences import forward_kl, jsd, reverse_kl
from lit_opd.types import Estimate, TokenBatch

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def _check_divergence(divergence: str, teacher_weight: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, found {divergence!r}")
    if not 0 <= teacher_weight <= 1:
        raise ValueError(f"teacher_weight must lie in [0, 1], found {teacher_weight}")


@register_estimator(
    "full_vocab",
    family="token",
    target="reverse_kl",
    unbiased=True,
    needs="full",
    source="GKD, arXiv:2306.13649; DeepSeek-V4, arXiv:2606.19348 (reverse)",
    check=_check_divergence,
    variants=(
        Variant({"divergence": "forward_kl"}, "the target is the chosen one", target="forward_kl"),
        Variant({"divergence": "jsd"}, "the target is the chosen one", target="jsd"),
        Variant({"divergence": "jsd", "teacher_weight": 0.1}, "lopsided mixture", target="jsd"),
    ),
)
def full_vocab(tokens: TokenBatch, *, divergence: str = "reverse_kl", teacher_weight: float = 0.5) -> Estimate:
    """Full-vocabulary divergence at every position of the student's own completion.

    Formula: loss_t = KL(student || teacher), KL(teacher || student), or the JSD of `functional.jsd`, over all V tokens.
    The gradient is that of the chosen divergence with the prefix held fixed, without sampling noise from the action;
    it costs the teacher's whole distribution.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        divergence: `reverse_kl`, `forward_kl` or `jsd`; the declared target is the chosen one.
        teacher_weight: the teacher's share of the JSD's mixture, 0 to 1; unused by the KLs.

    Returns:
        Loss, and the exact reverse KL as KL estimate.
    """
    assert tokens.student_full_logps_BTV is not None
    assert tokens.teacher_full_logps_BTV is not None
    student_logps, teacher_logps = tokens.student_full_logps_BTV, tokens.teacher_full_logps_BTV
    if divergence == "reverse_kl":
        loss = reverse_kl(student_logps, teacher_logps)
        return Estimate(loss_BT=loss, kl_BT=loss.detach())
    kl = reverse_kl(student_logps.detach(), teacher_logps)
    if divergence == "forward_kl":
        return Estimate(loss_BT=forward_kl(student_logps, teacher_logps), kl_BT=kl)
    return Estimate(loss_BT=jsd(student_logps, teacher_logps, teacher_weight), kl_BT=kl)
