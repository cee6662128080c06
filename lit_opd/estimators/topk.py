"""Estimators that compare student and teacher on K tokens a position, and do not look at the sampled one.

One function has all parts to choose from; a table gives the published forms of it their names.

>>> p, q = torch.tensor([[0.4, 0.4]]).log(), torch.tensor([[0.6, 0.2]]).log()  # K = 2 of a larger vocabulary
>>> tokens = TokenBatch(
...     p[:, 0], q[:, 0], p[:, 0], torch.tensor([True]), completion_ids_BT=torch.tensor([7]),
...     support_ids_BTK=torch.tensor([[3, 5]]), support_mask_BTK=torch.ones(1, 2).bool(),
...     student_support_logps_BTK=p, teacher_support_logps_BTK=q,
... )
>>> for mass in MASSES:
...     print(mass, topk_divergence(tokens, k=2, mass=mass).loss_BT)
truncate tensor([0.1151])
renormalise tensor([0.1438])
tail tensor([0.1151])
generalised tensor([0.1151])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.divergences import log_difference
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import SHARE, allow, one_of, whole
from lit_opd.functional.support import MASSES, SUPPORT_DIVERGENCES, support_divergence
from lit_opd.types import Estimate, TokenBatch

OTHER_SUPPORTS = tuple(
    Variant({"support": name}, "the contract does not depend on whose tokens are compared")
    for name in ("student", "union", "intersection")
)


def support_logps(tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Read log-probabilities of the support, student's and teacher's, [..., K], nats, -inf in slots without a token."""
    assert tokens.student_support_logps_BTK is not None
    assert tokens.teacher_support_logps_BTK is not None
    assert tokens.support_mask_BTK is not None
    empty = ~tokens.support_mask_BTK
    student, teacher = tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK
    return upcast(student).masked_fill(empty, -torch.inf), upcast(teacher).masked_fill(empty, -torch.inf)


def sampled_log_ratio(tokens: TokenBatch) -> Tensor:
    """Compute log p - log q of the sampled tokens, detached, infinite where the teacher cannot write them."""
    return log_difference(upcast(tokens.student_logps_BT).detach(), upcast(tokens.teacher_logps_BT))


def check_k(k: int, mass: str, support: str = "teacher", **_: object) -> None:
    """Refuse, with a ValueError, a support size that is none, or that leaves no gradient."""
    # The union of one token of each model may hold two.
    if mass == "renormalise" and support != "union":
        whole(2, "renormalised over one token, any two distributions are equal and the gradient is zero").check("k", k)
    whole().check("k", k)


def _check_divergence(divergence: str, mass: str, teacher_weight: float = 0.5, **size: Any) -> None:
    one_of(SUPPORT_DIVERGENCES).check("divergence", divergence)
    one_of(MASSES).check("mass", mass)
    SHARE.check("teacher_weight", teacher_weight)
    check_k(mass=mass, **size)


@register_estimator(
    "topk_divergence",
    target="reverse_kl",
    needs="support",
    source="the top-K forms of arXiv:2603.25562, 2606.30406, 2601.20802 and 2604.13016, by their parts",
    check=_check_divergence,
    variants=(
        *(Variant({"divergence": "jsd", "mass": "truncate", "teacher_weight": end}, "there the JSD is a truncated KL",
                  target="jsd", at_equal="never") for end in (0.0, 1.0)),
        Variant({"divergence": "jsd", "mass": "truncate"}, "between its ends, what moves the mass cancels at p = q",
                target="jsd"),
        Variant({"divergence": "jsd", "teacher_weight": 0.1}, "lopsided mixture", target="jsd"),
        Variant({"divergence": "jsd"}, "the target is the chosen one", target="jsd"),
        Variant({"divergence": "forward_kl", "mass": "truncate"}, "raises the mass of the support, even at p = q",
                target="forward_kl", at_equal="never"),
        Variant({"divergence": "forward_kl", "mass": "tail"}, "the target is the chosen one", target="forward_kl"),
        Variant({"divergence": "forward_kl"}, "the target is the chosen one", target="forward_kl"),
        Variant({"mass": "truncate"}, "lowers the mass of the support, even at p = q", at_equal="never"),
        *OTHER_SUPPORTS,
    ),
)  # fmt: skip
def topk_divergence(
    tokens: TokenBatch,
    *,
    k: int = 16,
    support: str = "teacher",
    divergence: str = "reverse_kl",
    mass: str = "renormalise",
    teacher_weight: float = 0.5,
) -> Estimate:
    """Sum any divergence over the K most probable tokens of either model or both, biased by what is outside.

    Formula: that of `functional.support`. No sampling noise for K numbers a token from the teacher.
    The bias against the divergence over the whole vocabulary goes to zero as both models' mass on the support goes to
    one; what is done about the rest is the choice of `mass`.

    Args:
        tokens: support log-probabilities under the full softmax, [..., K], nats.
        k: size of the support; of a union or an intersection, how many tokens of each model.
        support: whose most probable tokens: `teacher`, `student`, `union` or `intersection`.
        divergence: `reverse_kl`, `forward_kl` or `jsd`; the declared target is the chosen one.
        mass: `renormalise`, `truncate`, `tail` or `generalised`.
        teacher_weight: the teacher's share of the JSD's mixture, 0 to 1; unused by the KLs.
    """
    loss = support_divergence(
        *support_logps(tokens), tokens.support_mask_BTK, divergence=divergence, mass=mass, teacher_weight=teacher_weight
    )
    return Estimate(loss_BT=loss, kl_BT=sampled_log_ratio(tokens))


class _Preset(NamedTuple):
    """A published form of `topk_divergence`: two of its keywords, and what follows from them.

    `own_support` is the only one it is published with, None where it takes any, by default the teacher's.
    """

    name: str
    divergence: str
    mass: str
    source: str
    doc: str
    own_support: str | None = None
    at_equal: str = "sample"
    variants: tuple[Variant, ...] = ()


_PRESETS = (
    _Preset(
        "teacher_topk", "reverse_kl", "renormalise", own_support="teacher",
        source="arXiv:2603.25562, eq. 6-8 (local support matching)",
        doc="""
        Renormalise the reverse KL on the teacher's top K (local support matching), with little noise and blind outside.

        Formula, on the support S with p' and q' the two distributions renormalised over it: loss_t = sum over S of
        p' (log p' - log q'). No sampling noise; blind to how much mass the student puts outside S, and to K = 1.
        Special tokens are left out by `estimator.masked_tokens`, before any estimator sees them.""",
    ),
    _Preset(
        "student_topk", "reverse_kl", "tail", own_support="student",
        source="SDPO, arXiv:2601.20802; OEL, arXiv:2603.16856 (the student's top K)",
        doc="""
        Sum the reverse KL over the student's top K and one bucket of all others, a lower bound that holds most of it.

        Formula, with P and Q the masses on the support S: loss_t = sum over S of p (log p - log q) + (1 - P) log((1 -
        P) / (1 - Q)). Never above the full reverse KL. The student's own tokens carry most of its reverse KL, but the
        teacher must be asked for them: one that only serves its own top K cannot answer.""",
    ),
    _Preset(
        "union_topk", "reverse_kl", "renormalise", own_support="union",
        source="arXiv:2604.13016 (supports of both models)",
        doc="""
        Renormalise the reverse KL on the top K of student and teacher together, which are K to 2K tokens.

        Formula: that of `teacher_topk`, with S the union. It sees what the student writes and what the teacher would,
        for up to twice the numbers; where both agree on one token and K is 1, there is nothing to compare.""",
    ),
    _Preset(
        "topk_truncated_reverse_kl", "reverse_kl", "truncate", at_equal="never", variants=OTHER_SUPPORTS,
        source="verl #5041 (removed there); arXiv:2603.25562 without renormalisation",
        doc="""
        Sum the reverse KL over K tokens alone, which pushes the student's mass out of the support even at equality.

        Formula: loss_t = sum over S of p (log p - log q). At p = q the gradient is that of the student's mass on S, not
        zero, and the value may be negative. Here to compare with; `head_and_tail` and `topk_generalised_reverse_kl`
        repair it.""",
    ),
    _Preset(
        "topk_generalised_reverse_kl", "reverse_kl", "generalised", variants=OTHER_SUPPORTS,
        source="MOPD, arXiv:2606.30406, eq. 5",
        doc="""
        Match K tokens and their mass by the reverse KL of unnormalised measures, blind to all other tokens.

        Formula: loss_t = sum over S of p (log p - log q) - p + q. Never negative, zero only at p = q on S, and of use
        at K = 1: the truncated form without its drift of the mass.""",
    ),
    _Preset(
        "topk_tail_reverse_kl", "reverse_kl", "tail",
        source="the ghost token of arXiv:2601.20802 and TRL's iw_opd",
        variants=(
            Variant({"support": "student"}, "it is `student_topk`"),
            Variant({"support": "union", "k": 1}, "with more, a bucket of one token is left of a vocabulary of four"),
            Variant({"support": "intersection"}, "the contract does not depend on whose tokens are compared"),
        ),
        doc="""
        Sum the reverse KL over K tokens and one bucket of all others, a lower bound that sees how much mass is outside.

        Formula: that of `student_topk`, on any support. Blind only to how the mass outside is spread, which `resopd`
        samples.""",
    ),
    _Preset(
        "topk_tail_forward_kl", "forward_kl", "tail", variants=OTHER_SUPPORTS,
        source="as described of the residual symbol of ReTaCo, arXiv:2609.39275; verl #7855 (forward_kl_topk_tail)",
        doc="""
        Sum the forward KL over K tokens and one residual symbol for all others, which is at rest at the teacher.

        Formula, with P and Q the masses on the support S: loss_t = sum over S of q (log q - log p) + (1 - Q) log((1 -
        Q) / (1 - P)). Never above the full forward KL, and zero with its gradient only where p = q on S. To leave the
        symbol out moves the student away from the teacher: `topk_soft_targets`, which renormalises the teacher alone,
        and `topk_truncated_forward_kl` have the gradients of -log P and -P there. `topk_divergence`, which renormalises
        both sides, rests at the teacher too, but wherever p is proportional to q on S.""",
    ),
)  # fmt: skip


def _register_preset(preset: _Preset) -> None:
    name, divergence, mass = preset.name, preset.divergence, preset.mass

    def check(k: int, support: str) -> None:
        _check_divergence(divergence, mass, k=k, support=support)
        if preset.own_support not in (None, support):
            raise ValueError(f"support must be {preset.own_support}, found {support!r}; topk_divergence takes any")

    def topk(tokens: TokenBatch, *, k: int = 16, support: str = preset.own_support or "teacher") -> Estimate:
        return topk_divergence(tokens, k=k, support=support, divergence=divergence, mass=mass)

    topk.__doc__ = preset.doc
    register_estimator(
        name, target=divergence, needs="support", source=preset.source, check=check, at_equal=preset.at_equal,
        variants=preset.variants,
    )(topk)  # fmt: skip


for _preset in _PRESETS:
    _register_preset(_preset)


@register_estimator(
    "topk_truncated_forward_kl",
    target="forward_kl",
    needs="support",
    source="verl, forward_kl_topk; the clamp: verl #7855",
    check=allow(k=whole()),
    at_equal="never",
    variants=(Variant({"clamp": True}, "no gradient where the value is negative"), *OTHER_SUPPORTS),
)
def topk_truncated_forward_kl(
    tokens: TokenBatch, *, k: int = 16, support: str = "teacher", clamp: bool = False
) -> Estimate:
    """Sum the forward KL over K tokens alone, which pulls the student's mass into the support even at equality.

    Formula: loss_t = sum over S of q (log q - log p). At p = q the gradient is minus that of the student's mass on S.
    The value is negative as soon as the student has more mass on S than the teacher; clamped at zero, as published,
    such a position no longer learns at all.

    Args:
        tokens: support log-probabilities under the full softmax, [..., K], nats.
        k: size of the support.
        support: whose most probable tokens.
        clamp: whether a negative value counts zero, with its gradient.
    """
    estimate = topk_divergence(tokens, k=k, support=support, divergence="forward_kl", mass="truncate")
    if not clamp:
        return estimate
    return Estimate(estimate.loss_BT.clamp(min=0), estimate.kl_BT, clipped_BT=estimate.loss_BT < 0)
