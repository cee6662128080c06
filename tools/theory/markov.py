"""Bias and variance of registered estimators on a language model of realistic length, where the truth is still exact.

The model is a Markov chain: the next token depends on the last one, V tokens, T positions. Its exact gradients follow
by dynamic programming, and thousands of completions can be sampled, each with its own gradient of the logit table. So
the expected gradient of an estimator is known up to sampling error, and its variance too. Completions of one prompt
come in groups; for estimators that compare them, a group's gradient is the mean of its completions and its variance is
counted per completion (times the group's size).

Teacher and student share most of their logits, as after a short pre-training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator, build
from lit_opd.estimators.oracle import Completions, TabularPair, sample_gradients

CHUNK = 64
SEEDS, SIZES = (0, 1, 2), (2, 4, 8, 16)
GROUPED = ("leave_one_out", "centred_rao_blackwell_return", "exact_local_return")
ESTIMATORS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "token": ("token", {}),
    "vopd": ("vopd", {}),
    "head_and_tail, k=8": ("head_and_tail", {"k": 8}),
    "full_vocab": ("full_vocab", {}),
    "teacher_topk, k=8": ("teacher_topk", {"k": 8}),
    "k3_loss": ("k3_loss", {}),
    "hybrid, gamma=0.5": ("hybrid", {"gamma": 0.5}),
    "hybrid, gamma=0.9": ("hybrid", {"gamma": 0.9}),
    "sequence": ("sequence", {}),
    "leave_one_out": ("leave_one_out", {}),
    "rao_blackwell_return": ("rao_blackwell_return", {}),
    "centred_rao_blackwell_return": ("centred_rao_blackwell_return", {}),
    "exact_local_return": ("exact_local_return", {}),
}


@dataclass(frozen=True)
class Settings:
    """Of the chain (`vocabulary`, `horizon`, `distance` of the teacher's logits) and of the measurement."""

    vocabulary: int = 64
    horizon: int = 32
    distance: float = 0.5
    group: int = 8
    groups: int = 1024
    seed: int = 0

    @property
    def rows(self) -> int:
        """Completions that are sampled."""
        return self.group * self.groups


def make_chain(settings: Settings) -> TabularPair:
    """Context 0 is the beginning, context v + 1 follows token v."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (2, settings.vocabulary + 1, settings.vocabulary)
    common, difference = torch.randn(shape, generator=generator, dtype=torch.float64)
    return TabularPair(1.5 * common, 1.5 * common + settings.distance * difference, settings.horizon)


def exact_gradients(pair: TabularPair) -> dict[str, Tensor]:
    """Of the local and of the sequence reverse KL, by the expected number of visits to each context."""
    logits_CV = pair.student_logits_CV.clone().requires_grad_()
    student_CV, teacher_CV = logits_CV.log_softmax(-1), pair.teacher_logits_CV.log_softmax(-1)
    kl_C = (student_CV.exp() * (student_CV - teacher_CV)).sum(-1)
    here_C = torch.zeros_like(kl_C)
    here_C[0] = 1
    visits_C = here_C
    for _ in range(pair.horizon - 1):
        here_C = torch.cat([torch.zeros(1, dtype=kl_C.dtype), here_C @ student_CV.exp()])
        visits_C = visits_C + here_C
    objectives = {"reverse_kl": visits_C.detach() @ kl_C, "sequence_reverse_kl": visits_C @ kl_C}
    return {n: torch.autograd.grad(o, logits_CV, retain_graph=True)[0].flatten() for n, o in objectives.items()}


def sample(pair: TabularPair, rows: int, generator: torch.Generator) -> Completions:
    """Completions of the student."""
    probs_CV, context_B = pair.student_logits_CV.softmax(-1), torch.zeros(rows, dtype=torch.long)
    ids, contexts = [], []
    for _ in range(pair.horizon):
        contexts.append(context_B)
        ids.append(torch.multinomial(probs_CV[context_B], 1, generator=generator)[:, 0])
        context_B = ids[-1] + 1
    ids_BT = torch.stack(ids, dim=1)
    everywhere, rewards_B = torch.ones_like(ids_BT, dtype=torch.bool), torch.zeros(rows, dtype=torch.float64)
    return Completions(ids_BT, everywhere, torch.stack(contexts, dim=1), rewards_B)


def measure(settings: Settings, seeds: Sequence[int] = SEEDS, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Every estimator on a chain for each seed, and those that compare completions with groups of several sizes."""
    chains = [measure_chain(replace(settings, seed=seed)) for seed in seeds]
    grouped = {
        label: {size: measure_one(replace(settings, group=size, groups=settings.rows // size), label) for size in sizes}
        for label in GROUPED
    }
    return {"settings": asdict(settings), "seeds": list(seeds), "chains": chains, "sizes": grouped}


def measure_chain(settings: Settings) -> dict[str, dict[str, float]]:
    """`measure_one` of every estimator."""
    return {label: measure_one(settings, label) for label in ESTIMATORS}


def measure_one(settings: Settings, label: str) -> dict[str, float]:
    """Relative bias against both objectives, cosine, and variance per completion, of an estimator on one chain.

    Biases are norms over that of the objective's gradient, with the expected square of the sampling error taken off;
    `standard_error` is that error on the same scale.
    """
    pair, (name, keywords) = make_chain(settings), ESTIMATORS[label]
    completions = sample(pair, settings.rows, torch.Generator().manual_seed(settings.seed + 1))
    groups_SG = torch.arange(settings.rows).reshape(settings.groups, settings.group)
    mean, variance = _moments(pair, build(name, **keywords), completions, groups_SG)
    found = {"trace_variance": variance}
    for target, gradient in exact_gradients(pair).items():
        scale, noise = float(gradient.norm()), variance / settings.rows
        found[f"bias_{target}"] = math.sqrt(max(0.0, float((mean - gradient).square().sum()) - noise)) / scale
        found[f"standard_error_{target}"] = math.sqrt(noise) / scale
    return found


def _moments(
    pair: TabularPair, estimator: BoundEstimator, completions: Completions, groups_SG: Tensor
) -> tuple[Tensor, float]:
    """Mean gradient, and variance of one completion's, from all groups."""
    total, squares = torch.zeros(pair.student_logits_CV.numel(), dtype=torch.float64), 0.0
    for part in groups_SG.split(CHUNK):
        gradients_SG = sample_gradients(pair, estimator, completions, part)
        total += gradients_SG.sum(0)
        squares += float(gradients_SG.square().sum())
    count, size = groups_SG.shape
    mean = total / count
    return mean, size * (squares - count * float(mean.square().sum())) / (count - 1)
