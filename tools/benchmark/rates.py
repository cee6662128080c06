"""How fast this machine multiplies matrices, at the shapes of a workload, and moves memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from tools.benchmark.processes import answer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STREAM_BYTES = 512 * 2**20  # far beyond any cache


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The best of several tries of each.

    Args:
        job: `shapes`, by name [rows, inner, columns] of a product; `tries`.

    Returns:
        `bf16` and `fp32`, by the same names FLOP/s; `read` and `copy`, bytes/s, the latter of both directions.
    """
    tries = job["tries"]
    rates: dict[str, Any] = {
        name: {shape: _product_rate(*sizes, dtype, tries) for shape, sizes in job["shapes"].items()}
        for name, dtype in DTYPES.items()
    }
    source = torch.rand(STREAM_BYTES // 4)
    target = torch.empty_like(source)
    rates["read"] = source.nbytes / _best(source.sum, tries)
    rates["copy"] = 2 * source.nbytes / _best(lambda: target.copy_(source), tries)
    return rates | {"threads": torch.get_num_threads()}


def _product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, tries: int) -> float:
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return 2 * rows * inner * columns / _best(lambda: linear(a, b), tries)


def _best(call: Callable[[], Any], tries: int) -> float:
    call()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    answer(measure)
