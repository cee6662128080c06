"""Compare two categorical distributions, given as log-probabilities over the last dimension.

Every function takes normalised log-probabilities [..., V], the student's p first and the teacher's q second, and
returns nats [...]. Inputs are raised to fp32; tokens of probability zero contribute zero, to the value and to the
gradient. A keyword out of the range that is told for it raises a ValueError. Estimators differentiate these functions,
evaluations report them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import BELOW_ONE, SHARE


def expectation(weights: Tensor, values: Tensor) -> Tensor:
    """Sum weights x values over the last dimension, where a weight of zero counts zero even if the value is infinite.

    >>> expectation(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 3.0, torch.inf]))
    tensor(2.)
    """
    # Two `where`s: the inner one keeps 0 * inf out of the value, the outer one out of the gradient.
    possible = weights > 0
    return torch.where(possible, weights * torch.where(possible, values, 0.0), 0.0).sum(-1)


def log_difference(a_logps: Tensor, b_logps: Tensor) -> Tensor:
    """Subtract log-probabilities, with zero at what both hold impossible.

    >>> log_difference(torch.tensor([0.0, -torch.inf]), torch.tensor([-2.0, -torch.inf]))
    tensor([2., 0.])
    """
    both_impossible = torch.isneginf(a_logps) & torch.isneginf(b_logps)
    return torch.where(both_impossible, 0.0, a_logps) - torch.where(both_impossible, 0.0, b_logps)


def reverse_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute KL(student || teacher), the sum over tokens of p (log p - log q).

    It is infinite where the student can write what the teacher cannot.

    >>> reverse_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)
    """
    return _ReverseKL.apply(*torch.broadcast_tensors(upcast(student_logps), upcast(teacher_logps)))


class _ReverseKL(torch.autograd.Function):
    """`expectation(p, log_difference(log p, log q))`, at a third of the passes over the vocabulary.

    Every estimator over the full vocabulary stands on this sum: its passes are most of what the head costs beside the
    matrix products. What the student cannot write counts zero, in the value and in both gradients.
    """

    @staticmethod
    def forward(ctx: Any, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        probs = student_logps.exp()
        difference = (student_logps - teacher_logps).masked_fill_(probs == 0, 0.0)
        ctx.save_for_backward(probs, difference)
        return (probs * difference).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        probs, difference = ctx.saved_tensors
        weighted = probs * upstream[..., None]
        to_student = (difference + 1).mul_(weighted) if ctx.needs_input_grad[0] else None
        return to_student, weighted.neg_() if ctx.needs_input_grad[1] else None


def forward_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute KL(teacher || student), the sum over tokens of q (log q - log p).

    >>> forward_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1308)
    """
    return reverse_kl(teacher_logps, student_logps)


def mixed_kl(student_logps: Tensor, teacher_logps: Tensor, forward_weight: float) -> Tensor:
    """Compute a KL(teacher || student) + (1 - a) KL(student || teacher), with a = `forward_weight` in [0, 1].

    Source: arXiv:2605.16826.

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> mixed_kl(p, q, forward_weight=0.5), (reverse_kl(p, q) + forward_kl(p, q)) / 2
    (tensor(0.1373), tensor(0.1373))
    """
    SHARE.check("forward_weight", forward_weight)
    # A direction of weight zero may be infinite and must not be touched.
    if forward_weight == 0:
        return reverse_kl(student_logps, teacher_logps)
    if forward_weight == 1:
        return forward_kl(student_logps, teacher_logps)
    forward, reverse = forward_kl(student_logps, teacher_logps), reverse_kl(student_logps, teacher_logps)
    return forward_weight * forward + (1 - forward_weight) * reverse


def _mixture(a_logps: Tensor, b_logps: Tensor, a_share: float) -> Tensor:
    """Log-probabilities of a_share x a + (1 - a_share) x b, for a share strictly between 0 and 1."""
    # What neither can write counts zero later; here it must be finite, or the gradient of logaddexp(-inf, -inf) is NaN.
    nobody = torch.isneginf(a_logps) & torch.isneginf(b_logps)
    return torch.logaddexp(a_logps.masked_fill(nobody, 0.0) + math.log(a_share), b_logps + math.log1p(-a_share))


def jsd(student_logps: Tensor, teacher_logps: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence, scaled so that both ends are the KLs.

    With w = `teacher_weight` in [0, 1] and m = w q + (1 - w) p: (w KL(q || m) + (1 - w) KL(p || m)) / (w (1 - w)). As
    w -> 0 this tends to the forward KL, as w -> 1 to the reverse KL, and those are returned at the ends. At w = 0.5 it
    is four times the Jensen-Shannon divergence. Source: arXiv:2306.13649, eq. 4, divided by w (1 - w).

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> jsd(p, q), jsd(p, q, teacher_weight=1.0) == reverse_kl(p, q)
    (tensor(0.1353), tensor(True))
    """
    w = teacher_weight
    SHARE.check("teacher_weight", w)
    if w == 0:
        return forward_kl(student_logps, teacher_logps)
    if w == 1:
        return reverse_kl(student_logps, teacher_logps)
    student_logps, teacher_logps = upcast(student_logps), upcast(teacher_logps)
    mixture_logps = _mixture(teacher_logps, student_logps, w)
    return reverse_kl(student_logps, mixture_logps) / w + reverse_kl(teacher_logps, mixture_logps) / (1 - w)


def skew_forward_kl(student_logps: Tensor, teacher_logps: Tensor, skew: float) -> Tensor:
    """Compute KL(q || skew q + (1 - skew) p), the forward KL to a student that holds a share of the teacher.

    At most -log(skew), even where the student cannot write what the teacher can. `skew` lies in [0, 1), and 0 gives the
    forward KL. Source: DistiLLM, arXiv:2402.03898.

    >>> p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    >>> forward_kl(p, q), skew_forward_kl(p, q, skew=0.5)
    (tensor(inf), tensor(0.6931))
    """
    return _skewed(teacher_logps, student_logps, skew)


def skew_reverse_kl(student_logps: Tensor, teacher_logps: Tensor, skew: float) -> Tensor:
    """Compute KL(p || skew p + (1 - skew) q), the reverse KL to a teacher that holds a share of the student.

    At most -log(skew), even where the teacher cannot write what the student can. Source and range as of
    `skew_forward_kl`; the gradient also runs through the student's share of the mixture.

    >>> p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    >>> reverse_kl(p, q), skew_reverse_kl(p, q, skew=0.5)
    (tensor(inf), tensor(0.6931))
    """
    return _skewed(student_logps, teacher_logps, skew)


def _skewed(a_logps: Tensor, b_logps: Tensor, skew: float) -> Tensor:
    BELOW_ONE.check("skew", skew)
    if skew == 0:
        return reverse_kl(a_logps, b_logps)
    a_logps, b_logps = upcast(a_logps), upcast(b_logps)
    return reverse_kl(a_logps, _mixture(a_logps, b_logps, skew))


def tvd(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute the total variation distance, half the sum over tokens of |p - q|, from 0 to 1.

    Its gradient with respect to the student's logits is bounded whatever the teacher says, and zero at equality, where
    it has a kink. Unlike the others it has no unit. Source: arXiv:2307.15190.

    >>> tvd(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.2500)
    """
    return 0.5 * (upcast(student_logps).exp() - upcast(teacher_logps).exp()).abs().sum(-1)


def entropy(logps: Tensor) -> Tensor:
    """Compute the entropy, minus the sum over tokens of p log p.

    >>> entropy(torch.tensor([0.25, 0.25, 0.25, 0.25]).log())
    tensor(1.3863)
    """
    logps = upcast(logps)
    return -expectation(logps.exp(), logps)


def renormalise(logps: Tensor) -> Tensor:
    """Scale the probabilities of a support, log-probabilities [..., K] under the full softmax, to sum to one over it.

    >>> renormalise(torch.tensor([0.1, 0.3]).log()).exp()
    tensor([0.2500, 0.7500])
    """
    return torch.log_softmax(upcast(logps), dim=-1)
