"""Bring a model's weights to an engine that samples in another process.

`VllmEngine` calls this before every rollout. Weights have a label, which the engine keeps beside them. They are written
and loaded only where the engine's label differs: the model was trained, the engine was restarted, or another run gave
it weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Brings weights to one engine, whose processes on a machine wait for each other.

    Args:
        engine: its address.
        held: asks the engine for the label of its weights.
        load: makes the engine load `model.safetensors` of a folder, and keep the label given.
    """

    def __init__(self, engine: str, held: Callable[[], str], load: Callable[[str, str], None]) -> None:
        self.held, self.load = held, load
        name = f"lit_opd-{os.getuid()}-{hashlib.sha256(engine.encode()).hexdigest()[:16]}.lock"
        self._lock = Path(tempfile.gettempdir()) / name  # the user's own: nobody may write to another's

    def push(self, model: nn.Module, dtype: torch.dtype | None) -> str:
        """Replace the engine's weights where they are not the model's, and return their label.

        Floating-point weights are written in `dtype`, or in their own where it is None.
        """
        label = weights_label(model)
        if self.held() == label:
            return label
        with FileLock(self._lock):
            if self.held() != label:  # another process of this run may have loaded them while this one waited
                with passing_folder() as folder:
                    write_weights(model, folder, dtype)
                    self.load(folder, label)
        return label


@contextmanager
def passing_folder() -> Iterator[str]:
    """Make a folder that is gone afterwards, and also where this process is killed meanwhile.

    A shell waits for the end of its input, which the system closes with this process, and then removes the folder.
    """
    with tempfile.TemporaryDirectory(prefix="lit_opd-") as folder:
        waiting = ["sh", "-c", 'cat; rm -rf "$0"', folder]
        # In a session of its own: Ctrl-C in a terminal reaches a whole group.
        with subprocess.Popen(waiting, stdin=subprocess.PIPE, start_new_session=True):
            yield folder


def weights_label(model: nn.Module) -> str:
    """Label a model's weights by the sum of every tensor's bits, the same in every process.

    Torch's version counters (2.13) would be cheaper, but fused optimizers, the default here, and writes through `.data`
    do not count.

    Raises:
        UserError: the model is sharded, so that no process has its weights.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UserError("rollout.engine", "local for a sharded model", "vllm", "Set rollout.engine=local.")
    tensors = model.state_dict()
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()]).tolist()
    return hashlib.sha256(json.dumps([list(tensors), sums]).encode()).hexdigest()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Add up a tensor's bits as integers, the widest possible: those of 64 bits are added as fast as memory is read."""
    flat_N = tensor.contiguous().flatten()
    width = math.gcd(8, flat_N.nbytes, flat_N.storage_offset() * flat_N.element_size())
    return flat_N.view(INTEGERS[width]).sum(dtype=torch.int64)


def write_weights(model: Any, folder: str, dtype: torch.dtype | None) -> None:
    """Write a model's weights, as the hub names them and with adapters merged, to `model.safetensors` in a folder."""
    # transformers' save_pretrained writes nothing in processes other than the first, so it is not used.
    from transformers.core_model_loading import revert_weight_conversion

    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    weights, seen = {}, set()
    # safetensors refuses tensors that share memory, so tied weights are written once, under their first name.
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        seen.add(tensor.data_ptr())
    save_file(revert_weight_conversion(model, weights), Path(folder) / "model.safetensors")
