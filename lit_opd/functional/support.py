"""Compare models on K tokens a position: which tokens, by which divergence, and what of the mass outside.

A teacher that serves its most probable tokens alone, or a transfer of K numbers a token in place of V, leaves
estimators no more than this. Training and evaluations call it.

What a divergence of student p and teacher q on a support S does about the tokens outside, with P and Q the masses on S:

- `truncate`: nothing, the plain sum over S. May be negative; at p = q its gradient is grad P (reverse) or -grad P
  (forward), not zero. Source: arXiv:2603.25562 on why not.
- `renormalise`: both sides are scaled to sum to one over S. Blind to P and Q, and 0 for a single token. Source:
  arXiv:2603.25562, eq. 6-8.
- `tail`: all tokens outside become one bucket of mass 1 - P and 1 - Q. Never above the full divergence. Masses outside
  are resolved down to the floating-point epsilon, counted as this below it, and then have no gradient. Source:
  arXiv:2601.20802.
- `generalised`: the divergence of unnormalised measures, sum of p log(p / q) - p + q (reverse) or of
  q log(q / p) - q + p (forward). Never negative, zero only at p = q on S. For the JSD the two corrections cancel: it
  equals `truncate` for 0 < teacher_weight < 1, whose limits at the ends are the generalised KLs, not the truncated
  ones. Source: arXiv:2606.30406, eq. 5.

Where S is the whole vocabulary all four are the full divergence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_opd.functional.divergences import forward_kl, jsd, renormalise, reverse_kl
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import one_of

__all__ = ["MASSES", "SUPPORTS", "SUPPORT_DIVERGENCES", "choose_support", "join_supports", "outside_logp",
           "support_divergence", "support_mass"]  # fmt: skip

SUPPORTS = ("teacher", "student", "union", "intersection")
MASSES = ("truncate", "renormalise", "tail", "generalised")
SUPPORT_DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def choose_support(student_logps: Tensor, teacher_logps: Tensor, k: int, source: str) -> tuple[Tensor, Tensor]:
    """Choose the K most probable tokens of the teacher, of the student, or of both, as `source` in `SUPPORTS` says.

    Returns:
        Token ids and the mask of the slots that hold one: [..., K], for the union [..., 2K]. No token stands twice.

    >>> student, teacher = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.7]).log()
    >>> choose_support(student, teacher, k=1, source="union")
    (tensor([2, 0]), tensor([True, True]))
    """
    one_of(SUPPORTS).check("support", source)
    return join_supports(
        lambda: student_logps.topk(k, dim=-1).indices, lambda: teacher_logps.topk(k, dim=-1).indices, source
    )


def join_supports(student: Callable[[], Tensor], teacher: Callable[[], Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Join the K most probable tokens of both models, [..., K] each, where both are asked for, as `choose_support`."""
    if source in ("student", "teacher"):
        ids = student() if source == "student" else teacher()
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids, others = teacher(), student()
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    shared = ids[..., :, None] == others[..., None, :]
    if source == "intersection":
        return ids, shared.any(-1)
    return torch.cat([ids, others], dim=-1), torch.cat([everywhere, ~shared.any(-2)], dim=-1)


def support_divergence(
    student_logps_K: Tensor,
    teacher_logps_K: Tensor,
    mask_K: Tensor | None = None,
    *,
    divergence: str,
    mass: str,
    teacher_weight: float = 0.5,
) -> Tensor:
    """Compute a divergence of student p and teacher q on a support S of K tokens.

    Args:
        student_logps_K: [..., K] log-probabilities p under the full softmax.
        teacher_logps_K: [..., K] log-probabilities q under the full softmax.
        mask_K: [..., K] True where the slot belongs to the support, None where all do. What masked slots hold is
            ignored; a support without any slot has value and gradient zero.
        divergence: one of `SUPPORT_DIVERGENCES`.
        mass: one of `MASSES`, as the top of this file says.
        teacher_weight: the teacher's share of the JSD's mixture as in `divergences.jsd`; unused by the KLs.

    Returns:
        [...] nats; undefined (NaN) where `renormalise` meets a side without any mass on S.

    >>> p, q = torch.tensor([0.4, 0.4]).log(), torch.tensor([0.3, 0.3]).log()  # of a vocabulary of more
    >>> for mass in MASSES:
    ...     print(mass, round(support_divergence(p, q, divergence="reverse_kl", mass=mass).item(), 4))
    truncate 0.2301
    renormalise 0.0
    tail 0.0915
    generalised 0.0301
    """
    one_of(SUPPORT_DIVERGENCES).check("divergence", divergence)
    one_of(MASSES).check("mass", mass)
    if divergence == "jsd" and teacher_weight in (0, 1):
        divergence = "reverse_kl" if teacher_weight else "forward_kl"
    student_K, teacher_K = _inside(student_logps_K, mask_K), _inside(teacher_logps_K, mask_K)
    if mass == "renormalise":
        student_K, teacher_K = _renormalised(student_K, mask_K), _renormalised(teacher_K, mask_K)
    if mass == "tail":
        student_K, teacher_K = _with_tail(student_K), _with_tail(teacher_K)
    if divergence == "jsd":
        return jsd(student_K, teacher_K, teacher_weight)
    value = reverse_kl(student_K, teacher_K) if divergence == "reverse_kl" else forward_kl(student_K, teacher_K)
    if mass != "generalised":
        return value
    surplus = student_K.exp().sum(-1) - teacher_K.exp().sum(-1)
    return value - surplus if divergence == "reverse_kl" else value + surplus


def support_mass(logps_K: Tensor, mask_K: Tensor | None = None) -> Tensor:
    """Sum the probability of the support, with `mask_K` as of `support_divergence`.

    >>> support_mass(torch.tensor([0.5, 0.25, 0.125]).log())
    tensor(0.8750)
    """
    return _inside(logps_K, mask_K).exp().sum(-1)


def outside_logp(logps_K: Tensor, mask_K: Tensor | None = None) -> Tensor:
    """Compute the log-probability of all tokens outside the support together.

    Args:
        logps_K: [..., K] log-probabilities under the full softmax.
        mask_K: [..., K] True where the slot belongs to the support, None where all do.

    Returns:
        [...] nats, not below the logarithm of the floating-point epsilon, where it has no gradient.

    >>> outside_logp(torch.tensor([0.5, 0.25]).log()).exp()
    tensor(0.2500)
    """
    # Rounding leaves a mass outside of the order of epsilon on either side, or below zero. One floor under both keeps
    # log-ratio and gradient finite, and makes what lies below it count zero: it is the same on both sides.
    mass = support_mass(logps_K, mask_K)
    return torch.log1p(-mass.clamp(max=1 - torch.finfo(mass.dtype).eps))


def _inside(logps_K: Tensor, mask_K: Tensor | None) -> Tensor:
    logps_K = upcast(logps_K)
    return logps_K if mask_K is None else logps_K.masked_fill(~mask_K, -torch.inf)


def _renormalised(logps_K: Tensor, mask_K: Tensor | None) -> Tensor:
    if mask_K is not None:
        # A softmax over nothing is NaN: both sides of an empty support become the same distribution.
        logps_K = logps_K.masked_fill(~mask_K.any(-1, keepdim=True), 0.0)
    return renormalise(logps_K)


def _with_tail(logps_K: Tensor) -> Tensor:
    return torch.cat([logps_K, outside_logp(logps_K)[..., None]], dim=-1)
