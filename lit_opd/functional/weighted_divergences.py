"""Weigh tokens or directions of a divergence by what the two distributions are at the moment.

Arguments, units and errors are those of `divergences`. The weights are held fixed: no gradient runs through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.divergences import expectation, forward_kl, log_difference, reverse_kl
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import POSITIVE_SHARE, one_of

__all__ = ["WEIGHTINGS", "adaptive_kl", "logit_matching", "todi"]

WEIGHTINGS = ("student", "teacher", "uniform")


def adaptive_kl(student_logps: Tensor, teacher_logps: Tensor, head_mass: float = 0.5) -> Tensor:
    """Weigh forward and reverse KL by where the two distributions differ.

    The head is the smallest set of largest-first teacher tokens whose mass reaches `head_mass`, in (0, 1], the tail is
    the rest. With gap the sum of |p - q| over either: gap_head / (gap_head + gap_tail) KL(q || p) + gap_tail /
    (gap_head + gap_tail) KL(p || q). Source: AKL, arXiv:2404.02657.

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> adaptive_kl(p, q, head_mass=0.5), adaptive_kl(p, p)
    (tensor(0.1373), tensor(0.))
    """
    POSITIVE_SHARE.check("head_mass", head_mass)
    student_logps, teacher_logps = upcast(student_logps), upcast(teacher_logps)
    forward_weight = _share_of_head(student_logps.detach().exp(), teacher_logps.detach().exp(), head_mass)
    forward, reverse = forward_kl(student_logps, teacher_logps), reverse_kl(student_logps, teacher_logps)
    return forward_weight * forward + (1 - forward_weight) * reverse


def _share_of_head(student_probs: Tensor, teacher_probs: Tensor, head_mass: float) -> Tensor:
    sorted_probs, order = teacher_probs.sort(dim=-1, descending=True, stable=True)
    mass_before = sorted_probs.cumsum(-1) - sorted_probs
    # Rounding may keep the sum below a head_mass of 1: what the teacher cannot write is never in its head.
    in_head = (mass_before < head_mass) & (sorted_probs > 0)
    gap = (student_probs - teacher_probs).abs().gather(-1, order)
    head, tail = (torch.where(kept, gap, 0.0).sum(-1) for kept in (in_head, ~in_head))
    total = head + tail
    return torch.where(total > 0, head / torch.where(total > 0, total, 1.0), 0.5)


def todi(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Weigh forward and reverse KL token by token, by which side holds the token more probable.

    Sum over tokens of a q log(q / p) + (1 - a) p log(p / q), with a = sigmoid(log q - log p) = q / (p + q) held fixed.
    The value is KL(q || p) + KL(p || q), as a q - (1 - a) p = q - p; the gradient is not that of this sum. Source:
    ToDi, arXiv:2505.16297.

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> todi(p, q), reverse_kl(p, q) + forward_kl(p, q)
    (tensor(0.2747), tensor(0.2747))
    """
    student_logps, teacher_logps = upcast(student_logps), upcast(teacher_logps)
    log_ratio = log_difference(student_logps, teacher_logps)
    teacher_share, student_share = torch.sigmoid(-log_ratio.detach()), torch.sigmoid(log_ratio.detach())
    forward = expectation(teacher_share * teacher_logps.exp(), -log_ratio)
    return forward + expectation(student_share * student_logps.exp(), log_ratio)


def logit_matching(student_logps: Tensor, teacher_logps: Tensor, weighting: str = "student") -> Tensor:
    """Compute half the variance over tokens of log p - log q, zero where the logits agree up to a shift.

    Log-probabilities are logits up to a shift, which a variance does not see; it is also the sum over all pairs of
    tokens of the squared difference of their logit gaps, weighed by w_i w_j / 4. The choice of the weights is ours.
    With the student's, the gradient with respect to the logits is *exactly* that of the reverse KL, as in
    d/dz = p (log p - log q - KL): only the value differs. With the teacher's, or the same for every token, a gap keeps
    its pull where the student's softmax is saturated. Motivated by arXiv:2509.25837.

    `weighting`, one of `WEIGHTINGS`, says whose probabilities the weights are. Tokens impossible under either have no
    logit to match: they are left out and the weights rescaled to sum to one. The value is in nats squared.

    >>> p = torch.tensor([0.5, 0.5]).log()
    >>> logit_matching(p, p + 3.0), logit_matching(p, torch.tensor([0.25, 0.75]).log())
    (tensor(0.), tensor(0.1509))
    """
    one_of(WEIGHTINGS).check("weighting", weighting)
    student_logps, teacher_logps = upcast(student_logps), upcast(teacher_logps)
    comparable = ~(torch.isneginf(student_logps) | torch.isneginf(teacher_logps))
    gap = torch.where(comparable, student_logps, 0.0) - torch.where(comparable, teacher_logps, 0.0)
    weight_logps = {"student": student_logps, "teacher": teacher_logps}.get(weighting, torch.zeros_like(gap))
    weights = torch.where(comparable, weight_logps.detach().exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    centred = gap - (weights * gap).sum(-1, keepdim=True)
    return 0.5 * (weights * centred.square()).sum(-1)
