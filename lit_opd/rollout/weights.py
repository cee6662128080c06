"""Bring a model's weights to an engine that samples in another process.

`VllmEngine` calls it before every rollout. Weights are known by a label, which the engine keeps beside them: they are
written and loaded only where the engine has another label, because the model was trained, or because the engine was
started anew or given other weights by another run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_opd.errors import UserError

__all__ = ["WeightSync", "weights_label", "write_weights"]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightSync:
    """Keeps the weights of an engine equal to a model's.

    Args:
        engine: its address; processes of one machine that bring weights to it wait for each other.
        held: says the label of the weights that the engine holds.
        load: has the engine load `model.safetensors` of a folder, and keep the label given.
    """

    def __init__(self, engine: str, held: Callable[[], str], load: Callable[[str, str], None]) -> None:
        self.held, self.load = held, load
        self._lock = Path(tempfile.gettempdir()) / f"lit_opd-{hashlib.sha256(engine.encode()).hexdigest()[:16]}.lock"

    def push(self, model: nn.Module, dtype: torch.dtype | None) -> str:
        """Replace the engine's weights where they are not the model's; returns the label they are known by.

        Args:
            model: whose weights.
            dtype: that of floating-point weights in the engine; None for their own.
        """
        label = weights_label(model)
        if self.held() == label:
            return label
        with FileLock(self._lock):
            if self.held() != label:  # another process of this run may have been faster
                with tempfile.TemporaryDirectory(prefix="lit_opd-") as folder:
                    write_weights(model, folder, dtype)
                    self.load(folder, label)
        return label


def weights_label(model: nn.Module) -> str:
    """Name the weights as they are, by the sum of every tensor's bits.

    The same weights have the same label in every process. Not torch's version counters: a step of a fused optimizer,
    the default here, leaves them as they are (torch 2.13), as does whatever writes through `.data`.

    Raises:
        UserError: the model is sharded, so that no process has its weights.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UserError("rollout.engine", "local for a sharded model", "vllm", "Set rollout.engine=local.")
    tensors = model.state_dict()
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()]).tolist()
    return hashlib.sha256(json.dumps([list(tensors), sums]).encode()).hexdigest()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Add up a tensor's bits, as integers as wide as it allows: of 64 bits this is as fast as memory is read."""
    flat_N = tensor.contiguous().flatten()
    width = math.gcd(8, flat_N.nbytes, flat_N.storage_offset() * flat_N.element_size())
    return flat_N.view(INTEGERS[width]).sum(dtype=torch.int64)


def write_weights(model: Any, folder: str, dtype: torch.dtype | None) -> None:
    """Write the weights as the hub names them, adapters merged in a copy, to `model.safetensors` in a folder."""
    # Not save_pretrained, which writes nothing in processes other than the first.
    from transformers.core_model_loading import revert_weight_conversion

    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    weights, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # tied weights once, under their first name
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        seen.add(tensor.data_ptr())
    save_file(revert_weight_conversion(model, weights), Path(folder) / "model.safetensors")
