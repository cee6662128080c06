"""Settle how a run multiplies float32 values, and leave torch's global choices as they were found.

Why here: TF32 keeps 10 bits of a float32 value's 23, and torch decides on it for the whole process. An environment
variable (`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, which images of NVIDIA set) or another library may have switched it on, so
that `32-true` would mean something else from machine to machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import lightning as L
import torch

from lit_opd.config import Config

__all__ = ["settled", "tell"]

_log = logging.getLogger(__name__)

# Where torch 2.9 and later keep a choice for each kind of operation, beside the two older switches. Reading a switch
# raises where the two contradict each other, so the switches are only written then.
_PLACES = ("fp32_precision", "cuda.matmul.fp32_precision", "cudnn.fp32_precision", "cudnn.conv.fp32_precision",
           "cudnn.rnn.fp32_precision", "mkldnn.fp32_precision", "mkldnn.matmul.fp32_precision",
           "mkldnn.conv.fp32_precision", "mkldnn.rnn.fp32_precision")  # fmt: skip
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def settled(config: Config) -> Iterator[None]:
    """Compute products of float32 values in float32, or in TF32 where `optim.tf32` says so, while the context is open.

    What Lightning sets for `trainer.deterministic` is put back afterwards too.
    """
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn: Any = torch.backends.cudnn
    own, benchmark, workspace = _read(), cudnn.benchmark, os.environ.get(_WORKSPACE)
    tf32 = config.optim.tf32
    _write(("high" if tf32 else "highest", tf32, dict.fromkeys(_places()[:1], "none")))
    try:
        yield
    finally:
        _write(own)
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        cudnn.benchmark = benchmark
        os.environ.pop(_WORKSPACE, None)
        if workspace is not None:
            os.environ[_WORKSPACE] = workspace


def tell(config: Config, trainer: L.Trainer) -> None:
    """Say in the log what runs in which precision, on an accelerator."""
    device = trainer.strategy.root_device
    if device.type == "cpu" or not trainer.is_global_zero:
        return
    teachers = {f"teachers.{name}": one for name, one in config.teachers.items()} or {"teacher": config.teacher}
    frozen = ", ".join(f"{key} {one.dtype}" for key, one in teachers.items() if one.kind == "local")
    float32 = "TF32 (optim.tf32=true)" if config.optim.tf32 else "float32, without TF32"
    _log.warning(
        "On %s: student %s, trainer.precision %s; products of float32 in %s%s.",
        device, config.student.dtype, trainer.precision, float32, frozen and f"; {frozen}",
    )  # fmt: skip


State = tuple[str, bool, dict[str, str]]


def _places() -> tuple[str, ...]:
    return _PLACES if hasattr(torch.backends, "fp32_precision") else ()


def _read() -> State:
    found = {place: attrgetter(place)(torch.backends) for place in _places()}
    if not found:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, found
    products = "high" if found["cuda.matmul.fp32_precision"] == "tf32" else "highest"
    products = "medium" if found["mkldnn.matmul.fp32_precision"] == "bf16" else products
    return products, found["cudnn.conv.fp32_precision"] == "tf32", found


def _write(state: State) -> None:
    products, convolutions, found = state
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    for place, value in found.items():
        home, _, name = f"backends.{place}".rpartition(".")
        setattr(attrgetter(home)(torch), name, value)
