"""Take the gradient of one unit under one estimator, and weigh what it costs.

`experiment` calls it for every unit of prompts and every estimator that it looks at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType

from lit_opd.distiller import Distiller
from lit_opd.functional import upcast
from lit_opd.types import Rollout

__all__ = ["UnitGradient", "allocated_mb", "unit_gradient"]


class UnitGradient(NamedTuple):
    """One unit under one estimator."""

    gradients: list[Tensor]  # of the parameters, in their order
    token_norms_N: Tensor  # norm of the gradient by each counted token's last hidden state, a micro-batch after another
    seconds: float  # for the teacher's scores, forward and backward


def unit_gradient(distiller: Distiller, parameters: Sequence[Tensor], rollout: Rollout) -> UnitGradient:
    """Take the gradient of the mean over a unit's completions of their summed losses, as training computes it.

    The rollout has rewards where the estimator of the distiller's step wants them.
    """
    start = time.perf_counter()
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
    """Measure the most memory that tensors take during a call above what there was before, MB."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and (event.device_type() == DeviceType.CPU) == (device.type == "cpu")
    )
    return max(accumulate((change for _, change in changes), initial=0)) / 1e6
