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

from lit_opd.distiller import Distiller
from lit_opd.estimators import BoundEstimator
from lit_opd.functional import upcast
from lit_opd.types import Rollout

__all__ = ["Specimen", "UnitGradient", "allocated_mb", "unit_gradient"]


@dataclass(frozen=True)
class Specimen:
    """What is measured: the step that training makes, and which of the student's parameters are looked at.

    Attributes:
        distiller: samples, scores and estimates; its estimator is replaced by each that is measured.
        parameters: by name.
    """

    distiller: Distiller
    parameters: Mapping[str, Tensor]


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


def unit_gradient(specimen: Specimen, estimator: BoundEstimator, rollout: Rollout) -> UnitGradient:
    """Take the gradient of the mean over a unit's completions of their summed losses, as training computes it.

    Args:
        specimen: the models.
        estimator: whose loss.
        rollout: the completions of a unit, with rewards where the estimator wants them.
    """
    start = time.perf_counter()
    distiller, parameters = specimen.distiller.with_estimator(estimator), list(specimen.parameters.values())
    sums: list[Tensor] = []
    norms = []
    for micro in distiller.score(rollout):
        weights_BT = upcast(rollout.sampler_logps_BT[:0]).new_full(micro.rollout.mask_BT.shape, 1 / len(rollout))
        loss = distiller.estimate(micro, weights_BT)
        found = torch.autograd.grad(
            loss.value, [loss.hidden_NH, *parameters], allow_unused=True, materialize_grads=True
        )
        # Not in place: autograd may give two parameters one tensor.
        sums = [total + part for total, part in zip(sums, found[1:], strict=True)] if sums else list(found[1:])
        norms.append(upcast(found[0]).norm(dim=-1).cpu())
    if sums[0].device.type != "cpu":
        torch.accelerator.synchronize()
    return UnitGradient(sums, torch.cat(norms), time.perf_counter() - start)


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
