"""Tell what an optimizer keeps of a weight, whichever it is and whoever wrote it."""

from __future__ import annotations

from functools import lru_cache

import torch
import yaml

from lit_opd.config import OptimConfig
from lit_opd.errors import UserError
from lit_opd.optim import MUON, build_optimizer

__all__ = ["state_bytes"]

# Of bitsandbytes, which need not be installed where a run is planned: a byte a number, a scale for each 256 of them.
_IN_8_BITS = {"AdamW8bit": 2, "PagedAdamW8bit": 2, "Lion8bit": 1, "PagedLion8bit": 1}
_A_NUMBER = 1 + 4 / 256


def state_bytes(config: OptimConfig, dtype: torch.dtype, hidden: float = 1.0) -> float:
    """Tell the bytes that an optimizer keeps of a weight of this dtype, by a step on two small tensors.

    `hidden` is the share of weights in matrices of hidden layers, for Muon, which leaves the others to AdamW.

    Raises:
        UserError: there is no such optimizer, or it makes no step.
    """
    if config.name in _IN_8_BITS:
        return _IN_8_BITS[config.name] * _A_NUMBER
    if config.name == MUON:
        rest = _measured("AdamW", yaml.safe_dump(config.kwargs.get("adamw", {})), dtype)
        return hidden * _measured(MUON, yaml.safe_dump(config.kwargs), dtype) + (1 - hidden) * rest
    return _measured(config.name, yaml.safe_dump(config.kwargs), dtype)


@lru_cache
def _measured(name: str, kwargs: str, dtype: torch.dtype) -> float:
    # After so long a warm-up no step says what rounding loses.
    config = OptimConfig(name=name, kwargs=yaml.safe_load(kwargs), warmup_steps=2**31 - 1)
    try:
        held = [_state_of(config, dtype, rows) for rows in (64, 128)]
    except UserError:
        raise
    except Exception as error:  # every optimizer has its own way to refuse
        told = f"{type(error).__name__}: {error}"
        raise UserError("optim.name", f"{name} to make a step here", told, "Name another.") from error
    return (held[1] - held[0]) / (64 * 128)


def _state_of(config: OptimConfig, dtype: torch.dtype, rows: int) -> int:
    weight = torch.nn.Parameter(torch.ones(rows, 128, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(config, [weight])
    optimizer.step()
    return sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
