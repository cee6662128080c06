"""G3: the two heads alone, loss and both gradients, against the products that no implementation can leave out.

`ours` is the objective as it runs in a step, `dense` all logits in fp32 at once, `trl` and `liger` the kernels of these
libraries where they are installed. Working memory is what a call adds to inputs, less the gradients it leaves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.benchmark import head
from tools.benchmark.card.sizes import device_of, peak_gib, product_seconds, seconds, sizes_of
from tools.benchmark.head import Inputs
from tools.benchmark.processes import answer


def liger(inputs: Inputs) -> Tensor:
    """The Jensen-Shannon kernel of Liger, whose beta is the weight of the teacher."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(inputs.hidden_NH), dtype=torch.long, device=inputs.hidden_NH.device)
    compute = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    cast = [x.bfloat16() for x in inputs]
    return compute(cast[0], cast[1], cast[2], cast[3], labels)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time every pair of widths by every implementation that is installed."""
    sizes, device = sizes_of(job), device_of(job)
    fused = device.type == "cuda" and job["paths"] != "plain"
    computes: dict[str, Callable[[Inputs], Tensor]] = {"ours": partial(head.ours, fused=fused)}
    computes |= {"ours, plain": head.ours} if fused else {}
    computes |= {"dense": head.dense} if job["tiny"] or not job["quick"] else {}
    computes |= {"trl": head.trl} if importlib.util.find_spec("trl") and device.type == "cuda" else {}
    computes |= {"liger": liger} if importlib.util.find_spec("liger_kernel") and device.type == "cuda" else {}
    found = []
    for width, teacher_width in sizes.widths:
        positions, vocabulary = sizes.positions, sizes.vocabulary
        floor = product_seconds(
            device, (positions, width, vocabulary), (positions, teacher_width, vocabulary),
            (positions, vocabulary, width), (vocabulary, positions, width),
        )  # fmt: skip
        for name, compute in computes.items():
            found.append(
                {
                    "side": name,
                    "widths": f"{width}/{teacher_width}",
                    "floor_s": floor,
                    **case(compute, (positions, vocabulary, width, teacher_width), device, name == "dense"),
                }
            )
    return {"rows": found}


def case(
    compute: Callable[[Inputs], Tensor], shape: tuple[int, ...], device: torch.device, wide: bool
) -> dict[str, Any]:
    """Time one implementation, or tell why it failed."""
    inputs = head.make_inputs(*shape, device=device)
    if wide:
        inputs = inputs._replace(teacher_hidden_NG=inputs[2].float(), teacher_weight_VG=inputs[3].float())

    def run() -> None:
        inputs.hidden_NH.grad = inputs.weight_VH.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=not wide):
            compute(inputs).backward()

    try:
        run()
        taken, peak = seconds(run, device, tries=3, warm_up=1), peak_gib(run, device)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}
    return {"seconds": taken, "working_gib": peak}


if __name__ == "__main__":
    answer(measure)
