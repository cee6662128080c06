"""Measure what an optimizer keeps of a weight, whichever it is and whoever wrote it."""

from __future__ import annotations

from functools import lru_cache

import torch
import yaml

from lit_opd.config import OptimConfig
from lit_opd.optim import build_optimizer

__all__ = ["state_bytes"]


def state_bytes(config: OptimConfig, dtype: torch.dtype) -> float:
    """Measure the bytes that an optimizer keeps of a weight, by a step on two small tensors."""
    return _state_bytes(config.name, yaml.safe_dump(config.kwargs), dtype)


@lru_cache
def _state_bytes(name: str, kwargs: str, dtype: torch.dtype) -> float:
    # After so long a warm-up no step says what rounding loses.
    config = OptimConfig(name=name, kwargs=yaml.safe_load(kwargs), warmup_steps=2**31 - 1)
    held = [_state_of(config, dtype, rows) for rows in (64, 128)]
    return (held[1] - held[0]) / (64 * 128)


def _state_of(config: OptimConfig, dtype: torch.dtype, rows: int) -> int:
    weight = torch.nn.Parameter(torch.ones(rows, 128, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(config, [weight])
    optimizer.step()
    return sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
