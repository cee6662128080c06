"""Estimators that compare student and teacher on the whole vocabulary.

The sum over all tokens has no action noise, whatever the student samples, and costs the teacher's whole distribution.

>>> import torch
>>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()  # one position, two tokens
>>> tokens = TokenBatch(
...     p[:, 0], q[:, 0], p[:, 0], torch.tensor([True]), student_full_logps_BTV=p, teacher_full_logps_BTV=q
... )
>>> full_vocab(tokens).loss_BT, total_variation(tokens).loss_BT
(tensor([0.1438]), tensor([0.2500]))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.divergences import (
    forward_kl,
    jsd,
    mixed_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from lit_opd.functional.ranges import BELOW_ONE, SHARE, allow, one_of
from lit_opd.types import Estimate, TokenBatch

DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd, "tvd": tvd, "skew_reverse_kl": skew_reverse_kl,
    "skew_forward_kl": skew_forward_kl,
}  # fmt: skip


def full_logps(tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Read student and teacher log-probabilities of the whole vocabulary, [..., V], nats."""
    assert tokens.student_full_logps_BTV is not None
    assert tokens.teacher_full_logps_BTV is not None
    return tokens.student_full_logps_BTV, tokens.teacher_full_logps_BTV


def with_exact_kl(tokens: TokenBatch, loss_BT: Tensor) -> Estimate:
    """Add the exact reverse KL, to log, to a loss."""
    student_logps, teacher_logps = full_logps(tokens)
    return Estimate(loss_BT=loss_BT, kl_BT=reverse_kl(student_logps.detach(), teacher_logps))


@register_estimator(
    "full_vocab",
    target="reverse_kl",
    unbiased=True,
    needs="full",
    source="GKD, arXiv:2306.13649; DeepSeek-V4, arXiv:2606.19348 (reverse)",
    check=allow(divergence=one_of(DIVERGENCES), teacher_weight=SHARE, skew=BELOW_ONE),
    variants=(
        Variant({"divergence": "forward_kl"}, "the target is the chosen one", target="forward_kl"),
        Variant({"divergence": "jsd", "teacher_weight": 0.1}, "lopsided mixture", target="jsd"),
        Variant({"divergence": "jsd"}, "the target is the chosen one", target="jsd"),
        Variant({"divergence": "tvd"}, "the target is the chosen one", target="tvd"),
        Variant({"divergence": "skew_reverse_kl", "skew": 0.7}, "mostly the student itself", target="skew_reverse_kl"),
        Variant({"divergence": "skew_reverse_kl"}, "the target is the chosen one", target="skew_reverse_kl"),
        Variant({"divergence": "skew_forward_kl", "skew": 0.7}, "mostly the teacher itself", target="skew_forward_kl"),
        Variant({"divergence": "skew_forward_kl"}, "the target is the chosen one", target="skew_forward_kl"),
    ),
)
def full_vocab(
    tokens: TokenBatch, *, divergence: str = "reverse_kl", teacher_weight: float = 0.5, skew: float = 0.1
) -> Estimate:
    """Sum a divergence over the whole vocabulary, without action noise, for the teacher's whole distribution.

    Formula: loss_t = the divergence of that name in `functional.divergences`, over all V tokens. The gradient is that
    of the chosen divergence with the prefix held fixed, without sampling noise from the action; it costs the teacher's
    whole distribution.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        divergence: `reverse_kl`, `forward_kl`, `jsd`, `tvd`, `skew_reverse_kl` or `skew_forward_kl`; the declared
            target is the chosen one.
        teacher_weight: the teacher's share of the JSD's mixture, 0 to 1; unused by the others.
        skew: the share of the skew divergences' first argument in their mixture, 0 to below 1; unused by the others.
    """
    keywords = {"jsd": {"teacher_weight": teacher_weight}}
    keywords |= {name: {"skew": skew} for name in ("skew_reverse_kl", "skew_forward_kl")}
    loss = DIVERGENCES[divergence](*full_logps(tokens), **keywords.get(divergence, {}))
    if divergence == "reverse_kl":
        return Estimate(loss_BT=loss, kl_BT=loss.detach())
    return with_exact_kl(tokens, loss)


@register_estimator("tvd", target="tvd", unbiased=True, needs="full", source="arXiv:2307.15190")
def total_variation(tokens: TokenBatch) -> Estimate:
    """Halve the sum of |p - q| over the vocabulary, bounded like its gradient, which does not fade near the teacher.

    Formula: loss_t = half the sum over tokens of |p - q|. By a student logit the gradient is at most p (1 - p),
    whatever the log-ratio, and of one size however small the difference: a token the student all but forgot is not
    pulled.
    """
    return full_vocab(tokens, divergence="tvd")


@register_estimator(
    "distillm",
    target="skew_reverse_kl",
    unbiased=True,
    needs="full",
    source="DistiLLM, arXiv:2402.03898; for the student's completions, DistiLLM-2, arXiv:2503.07067",
    check=allow(divergence=one_of(("skew_reverse_kl", "skew_forward_kl")), skew=BELOW_ONE),
    variants=(Variant({"divergence": "skew_forward_kl"}, "the target is the chosen one", target="skew_forward_kl"),),
)
def distillm(tokens: TokenBatch, *, divergence: str = "skew_reverse_kl", skew: float = 0.1) -> Estimate:
    """Take the KL to a mixture that holds a share of its first argument, which bounds it by -log(share).

    Formula, with a = `skew`: loss_t = KL(p || a p + (1 - a) q), or KL(q || a q + (1 - a) p). The optimum is the
    teacher; on the way the pull of tokens that one side holds impossible stays small.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        divergence: `skew_reverse_kl` or `skew_forward_kl`; the declared target is the chosen one.
        skew: the share, 0 to below 1.
    """
    return full_vocab(tokens, divergence=divergence, skew=skew)


@register_estimator(
    "mixed_kl",
    needs="full",
    source="arXiv:2605.16826",
    check=allow(forward_weight=SHARE),
    variants=(
        Variant({"forward_weight": 0.0}, "it is the reverse KL", target="reverse_kl", unbiased=True),
        Variant({"forward_weight": 1.0}, "it is the forward KL", target="forward_kl", unbiased=True),
        Variant({"forward_weight": 0.9}, "lopsided"),
    ),
)
def mixed_kl_estimator(tokens: TokenBatch, *, forward_weight: float = 0.5) -> Estimate:
    """Sum forward and reverse KL over the whole vocabulary with weights, which covers modes and seeks them.

    Formula, with a = `forward_weight`: loss_t = a KL(teacher || student) + (1 - a) KL(student || teacher). Exact, but
    infinite where either side holds a token impossible that the other may write; the JSD is the bounded alternative.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        forward_weight: share of the forward KL, 0 to 1.
    """
    return with_exact_kl(tokens, mixed_kl(*full_logps(tokens), forward_weight))
