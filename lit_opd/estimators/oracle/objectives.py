"""Compute the objectives' own gradients from the tables, without any sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.estimators.oracle.tabular import TabularPair

__all__ = ["TARGETS", "exact_gradient", "probabilities"]

TARGETS = ("sequence_reverse_kl", "reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl", "tvd",
           "outcome")  # fmt: skip


def exact_gradient(pair: TabularPair, target: str, teacher_weight: float = 0.5, skew: float = 0.1) -> Tensor:
    """Differentiate an objective by the student's logits, from the tables and without any sample.

    Every divergence sums, over contexts, the probability to come there times a divergence of the next-token
    distributions. For `sequence_reverse_kl` the gradient also runs through that probability (chain rule of the KL); the
    others are local: prefixes are taken as the sampler writes them. `outcome` is minus the expected reward. Keywords of
    divergences are those of `functional.divergences`.

    Raises:
        ValueError: a target that is none of `TARGETS`.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, found {target!r}")
    logits_CV = pair.student_logits_CV.clone().requires_grad_()
    student_CV, teacher_CV = logits_CV.log_softmax(-1), pair.teacher_logits_CV.log_softmax(-1)
    if target == "outcome":
        objective = -(probabilities(pair, student_CV) * pair.rewards()).sum()
    else:
        along = student_CV if target == "sequence_reverse_kl" else pair.law_logps_CV
        objective = (pair.reach(along) * _divergence(student_CV, teacher_CV, target, teacher_weight, skew)).sum()
    return torch.autograd.grad(objective, logits_CV)[0].flatten()


def _divergence(student_CV: Tensor, teacher_CV: Tensor, target: str, teacher_weight: float, skew: float) -> Tensor:
    # Not those of lit_opd.functional: an oracle that shares code with what it checks would share its mistakes.
    p, q = student_CV.exp(), teacher_CV.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if target in ("sequence_reverse_kl", "reverse_kl"):
        return kl(p, q)
    if target == "tvd":
        return (p - q).abs().sum(-1) / 2
    if target.startswith("skew"):
        first, second = (p, q) if target == "skew_reverse_kl" else (q, p)
        return kl(first, skew * first + (1 - skew) * second)
    w = 0.0 if target == "forward_kl" else teacher_weight
    if w in (0.0, 1.0):
        return kl(p, q) if w else kl(q, p)
    mixture = w * q + (1 - w) * p
    return kl(q, mixture) / (1 - w) + kl(p, mixture) / w


def probabilities(pair: TabularPair, logps_CV: Tensor) -> Tensor:
    """Compute the probability of each completion under a model, [B]."""
    ids_BT, mask_BT, contexts_BT = pair.completions()
    return torch.where(mask_BT, logps_CV[contexts_BT, ids_BT], 0.0).sum(1).exp()
