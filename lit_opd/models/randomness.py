"""Keep the random state that dropout draws from, and go on with it.

A dropout layer on an accelerator draws from the accelerator's own generator, not from that of the CPU. Samples are no
part of it: they are drawn from numbers that seed, row and completion name. The module's checkpoints hold the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["random_state", "restore_random_state"]

_CPU, _ACCELERATOR = "torch_rng_state", "accelerator_rng_state"


def random_state(device: torch.device) -> dict[str, Any]:
    """Read the generators that a step on a device draws from: the CPU's and the device's, as a checkpoint holds them.

    Every process has one device. Those of a run with several restore the state of the first.
    """
    found: dict[str, Any] = {_CPU: torch.get_rng_state()}
    if device.type != "cpu":
        found[_ACCELERATOR] = (device.type, torch.get_device_module(device.type).get_rng_state())
    return found


def restore_random_state(checkpoint: Mapping[str, Any]) -> None:
    """Set the generators as `random_state` found them, on the present device of that kind where there is one."""
    torch.set_rng_state(checkpoint[_CPU].cpu())
    kind, state = checkpoint.get(_ACCELERATOR, ("cpu", None))
    if kind != "cpu" and torch.get_device_module(kind).is_available():
        torch.get_device_module(kind).set_rng_state(state.cpu())
