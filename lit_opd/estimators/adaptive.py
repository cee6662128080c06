"""Estimators on the whole vocabulary whose weights follow the two distributions.

>>> import torch
>>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()  # one position, two tokens
>>> tokens = TokenBatch(
...     p[:, 0], q[:, 0], p[:, 0], torch.tensor([True]), student_full_logps_BTV=p, teacher_full_logps_BTV=q
... )
>>> todi(tokens).loss_BT, adaptive_kl(tokens).loss_BT
(tensor([0.2747]), tensor([0.1373]))
"""

from __future__ import annotations

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.full import full_logps, with_exact_kl
from lit_opd.estimators.registry import register_estimator
from lit_opd.functional import weighted_divergences
from lit_opd.functional.ranges import POSITIVE_SHARE, allow, one_of
from lit_opd.types import Estimate, TokenBatch


@register_estimator("adaptive_kl", needs="full", source="AKL, arXiv:2404.02657", check=allow(head_mass=POSITIVE_SHARE))
def adaptive_kl(tokens: TokenBatch, *, head_mass: float = 0.5) -> Estimate:
    """Weigh forward against reverse KL by whether the models differ in the teacher's head or in its tail.

    Formula, with the head the teacher's most probable tokens up to `head_mass` and g the sum of |p - q| over head or
    tail, held fixed: loss_t = (g_head KL(teacher || student) + g_tail KL(student || teacher)) / (g_head + g_tail).
    Exact; as the weights move with the student, it is not the gradient of one divergence.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        head_mass: teacher mass of the head, above 0 to 1.
    """
    return with_exact_kl(tokens, weighted_divergences.adaptive_kl(*full_logps(tokens), head_mass))


@register_estimator("todi", needs="full", source="ToDi, arXiv:2505.16297")
def todi(tokens: TokenBatch) -> Estimate:
    """Switch softly, token by token, from forward KL where the teacher is more probable to reverse KL elsewhere.

    Formula, with a = sigmoid(log q - log p) held fixed: loss_t = sum over tokens of a q log(q / p) + (1 - a) p
    log(p / q). Exact; the value is the sum of both KLs, the gradient is not.
    """
    return with_exact_kl(tokens, weighted_divergences.todi(*full_logps(tokens)))


@register_estimator(
    "logit_matching",
    needs="full",
    source="motivated by CSD, arXiv:2509.25837",
    check=allow(weighting=one_of(weighted_divergences.WEIGHTINGS)),
    variants=(
        Variant({"weighting": "student"}, "it is the reverse KL", target="reverse_kl", unbiased=True),
        Variant({"weighting": "uniform"}, "every token counts the same"),
    ),
)
def logit_matching(tokens: TokenBatch, *, weighting: str = "teacher") -> Estimate:
    """Match logits up to a shift by their squared differences, which pull where the student's softmax is saturated.

    Formula: loss_t = half the variance over tokens, under the weights, of log p - log q. With the student's weights
    its gradient is that of the reverse KL; with the teacher's, a token that the student all but forgot is pulled as
    hard as any.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        weighting: whose probabilities, held fixed, are the weights: `teacher`, `student` or `uniform`.

    Returns:
        Loss in nats squared, and the exact reverse KL as KL estimate.
    """
    return with_exact_kl(tokens, weighted_divergences.logit_matching(*full_logps(tokens), weighting))
