"""Divergences between two categorical distributions, given as log-probabilities over the last dimension.

Every function takes student first and teacher second and returns nats, one value per position. Inputs are raised to
fp32; tokens of probability zero contribute zero, to the value and to the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast

__all__ = ["entropy", "forward_kl", "jsd", "renormalise", "reverse_kl"]


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    # Two `where`s: the inner one keeps 0 * inf out of the value, the outer one out of the gradient.
    possible = probs > 0
    return torch.where(possible, probs * torch.where(possible, values, 0.0), 0.0).sum(-1)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    both_impossible = torch.isneginf(a) & torch.isneginf(b)
    return torch.where(both_impossible, 0.0, a) - torch.where(both_impossible, 0.0, b)


def reverse_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KL(student || teacher): sum over tokens of p (log p - log q).

    Args:
        student_logps: [..., V] log-probabilities p, normalised.
        teacher_logps: [..., V] log-probabilities q, normalised.

    Returns:
        [...] nats; infinite where the student can write what the teacher cannot.

    >>> reverse_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)
    """
    student_logps, teacher_logps = upcast(student_logps), upcast(teacher_logps)
    return _expected(student_logps.exp(), _difference(student_logps, teacher_logps))


def forward_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KL(teacher || student): sum over tokens of q (log q - log p). Arguments as in `reverse_kl`.

    >>> forward_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1308)
    """
    return reverse_kl(teacher_logps, student_logps)


def jsd(student_logps: Tensor, teacher_logps: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, scaled so that both ends are the KLs.

    With w = `teacher_weight` and m = w q + (1 - w) p: (w KL(q || m) + (1 - w) KL(p || m)) / (w (1 - w)). As w -> 0
    this tends to the forward KL, as w -> 1 to the reverse KL, and those are returned at the ends. At w = 0.5 it is
    four times the Jensen-Shannon divergence. Source: arXiv:2306.13649, eq. 4, divided by w (1 - w).

    Args:
        student_logps: [..., V] log-probabilities p, normalised.
        teacher_logps: [..., V] log-probabilities q, normalised.
        teacher_weight: share w of the teacher in the mixture, 0 to 1.

    Returns:
        [...] nats.

    Raises:
        ValueError: `teacher_weight` outside [0, 1].
    """
    w = teacher_weight
    if not 0 <= w <= 1:
        raise ValueError(f"teacher_weight must lie in [0, 1], found {w}")
    if w == 0:
        return forward_kl(student_logps, teacher_logps)
    if w == 1:
        return reverse_kl(student_logps, teacher_logps)
    student_logps, teacher_logps = upcast(student_logps), upcast(teacher_logps)
    weights = torch.tensor([1 - w, w], dtype=student_logps.dtype, device=student_logps.device).log()
    # What neither can write counts zero below; here it must be finite, or the gradient of logaddexp(-inf, -inf) is NaN.
    nobody = torch.isneginf(student_logps) & torch.isneginf(teacher_logps)
    mixture_logps = torch.logaddexp(student_logps.masked_fill(nobody, 0.0) + weights[0], teacher_logps + weights[1])
    student_part = _expected(student_logps.exp(), _difference(student_logps, mixture_logps))
    teacher_part = _expected(teacher_logps.exp(), _difference(teacher_logps, mixture_logps))
    return student_part / w + teacher_part / (1 - w)


def entropy(logps: Tensor) -> Tensor:
    """Entropy: minus the sum over tokens of p log p.

    Args:
        logps: [..., V] log-probabilities, normalised.

    Returns:
        [...] nats.
    """
    logps = upcast(logps)
    return -_expected(logps.exp(), logps)


def renormalise(logps: Tensor) -> Tensor:
    """Log-probabilities of a support, scaled to sum to one over it.

    Args:
        logps: [..., K] log-probabilities under the full softmax.

    Returns:
        [..., K] log-probabilities that sum to one over K.
    """
    return torch.log_softmax(upcast(logps), dim=-1)
