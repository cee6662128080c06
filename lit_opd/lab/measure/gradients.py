"""The gradient of one unit under one estimator, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType

from lit_opd import models
from lit_opd.estimators import BoundEstimator
from lit_opd.functional import Head, upcast
from lit_opd.models import LanguageModel
from lit_opd.rollout import micro_batches
from lit_opd.types import Rollout, ScoredRollout

__all__ = ["Specimen", "UnitGradient", "allocated_mb", "unit_gradient"]


@dataclass(frozen=True)
class Specimen:
    """The models of a measurement, and which of the student's parameters are looked at.

    Attributes:
        student: the model whose gradients are taken.
        teacher: the frozen model.
        reference: another one, where an estimator asks for it.
        parameters: by name.
        head_rows: positions a chunk of the head.
        micro_batch_tokens: tokens, with padding, whose activations are kept at once.
    """

    student: LanguageModel
    teacher: LanguageModel
    reference: LanguageModel | None
    parameters: Mapping[str, Tensor]
    head_rows: int
    micro_batch_tokens: int


class UnitGradient(NamedTuple):
    """What one unit says under one estimator.

    Attributes:
        gradients: of the parameters, in their order.
        token_norms_N: norm of the gradient by each counted token's last hidden state, a micro-batch after the other.
        seconds: teacher's scores, forward and backward.
    """

    gradients: list[Tensor]
    token_norms_N: Tensor
    seconds: float


def unit_gradient(
    specimen: Specimen, estimator: BoundEstimator, rollout: Rollout, rewards_B: Tensor | None
) -> UnitGradient:
    """The gradient of the mean over a unit's completions of their summed losses, as training computes it.

    Args:
        specimen: the models.
        estimator: whose loss.
        rollout: the completions of a unit.
        rewards_B: [B], where the estimator wants them.
    """
    start = time.perf_counter()
    student, parameters = _Listened(specimen.student), list(specimen.parameters.values())
    sums: list[Tensor] = []
    norms = []
    for micro in _scored(specimen, estimator, rollout, rewards_B):
        weights_BT = upcast(rollout.sampler_logps_BT[:0]).new_full(micro.rollout.mask_BT.shape, 1 / len(rollout))
        loss, _ = models.student_loss(student, micro, specimen.teacher.head, estimator, weights_BT, specimen.head_rows)  # type: ignore[arg-type]
        found = torch.autograd.grad(loss, [student.hidden_NH, *parameters], allow_unused=True, materialize_grads=True)
        # Not in place: autograd may give two parameters one tensor.
        sums = [total + part for total, part in zip(sums, found[1:], strict=True)] if sums else list(found[1:])
        norms.append(upcast(found[0]).norm(dim=-1).cpu())
    if sums[0].device.type != "cpu":
        torch.accelerator.synchronize()
    return UnitGradient(sums, torch.cat(norms), time.perf_counter() - start)


def _scored(
    specimen: Specimen, estimator: BoundEstimator, rollout: Rollout, rewards_B: Tensor | None
) -> list[ScoredRollout]:
    """The unit's micro-batches, scored before any student activation exists."""
    reference = specimen.reference if "reference" in estimator.needs else None
    rewards_B = rewards_B if "rewards" in estimator.needs else None
    rows, whole_prompts = torch.arange(len(rollout)), "groups" in estimator.needs
    scored = []
    with specimen.teacher.evaluating():  # brings an offloaded teacher once for all of them
        for index in micro_batches(rollout, rows, specimen.micro_batch_tokens, whole_prompts):
            micro = rollout.rows(index)
            scores = models.score(specimen.teacher, reference, micro, estimator, specimen.head_rows)
            scored.append(ScoredRollout(micro, scores, None if rewards_B is None else rewards_B[index], progress=0.0))
    return scored


class _Listened:
    """A student that keeps the last hidden states it gave."""

    def __init__(self, student: LanguageModel) -> None:
        self.student = student
        self.hidden_NH = torch.empty(0)

    def hidden_and_head(self, rollout: Rollout) -> tuple[Tensor, Head]:
        """As the student's own."""
        self.hidden_NH, head = self.student.hidden_and_head(rollout)
        return self.hidden_NH, head


def allocated_mb(run: Callable[[], Any], device: torch.device) -> float:
    """The most memory that tensors take during a call above what there was before, MB."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and (event.device_type() == DeviceType.CPU) == (device.type == "cpu")
    )
    return max(accumulate((change for _, change in changes), initial=0)) / 1e6
