"""Read checkpoints, and put their weights into a model.

Called by `train` and `evaluate`, and by the command `export`.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lit_opd.errors import UserError
from lit_opd.models import frozen_names

__all__ = ["check_weights", "load_weights", "read_checkpoint", "read_training_state"]

# A resumed run needs these beside the weights.
TRAINING_STATE = ("global_step", "loops", "optimizer_states", "torch_rng_state", "pytorch-lightning_version")


def read_checkpoint(key: str, path: Path) -> dict[str, Any]:
    """Read a checkpoint, as plain tensors and values only, which are read when they are used.

    Every `UserError` of this module names `key`, the option that named the file: `--resume` or `--checkpoint`.
    """
    if not path.is_file():
        raise UserError(key, "a checkpoint file", f"no file {str(path)!r}", "Check the path.")
    try:
        _check_sums(path, path.stat().st_mtime_ns)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # there is no end to what a damaged file makes the reader raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "It is damaged or no checkpoint of lit_opd: choose another one."
        raise UserError(key, "a readable checkpoint", f"{str(path)!r}: {reason[:120]}", remedy) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        found = f"{str(path)!r}, without weights"
        raise UserError(key, "a checkpoint of lit_opd", found, "Choose another file.")
    return checkpoint


@lru_cache
def _check_sums(path: Path, changed_ns: int) -> None:
    """Compare every part of a file with the checksum that `torch.save` wrote beside it and `torch.load` ignores."""
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise ValueError(f"its part {part!r} is not what was written")


def read_training_state(key: str, path: Path) -> dict[str, Any]:
    """Read a checkpoint that training can go on from, with more than weights in it."""
    checkpoint = read_checkpoint(key, path)
    for name in TRAINING_STATE:
        if name not in checkpoint:
            found = f"{str(path)!r}, without {name!r}"
            raise UserError(key, "a checkpoint that fit wrote", found, "Choose another file.")
    return checkpoint


def check_weights(key: str, model: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Read the weights in a checkpoint, and refuse those of another model."""
    held = read_checkpoint(key, path)["state_dict"]
    weights = {name.removeprefix("model."): value for name, value in held.items() if name.startswith("model.")}
    own, frozen = model.state_dict(), frozen_names(model)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)} - frozen
    differing = sorted((weights.keys() - own.keys()) | (trained - weights.keys()))
    differing += [name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape]
    if differing:
        found = f"{str(path)!r}, which differs at {differing[0]!r}"
        raise UserError(key, "weights of this student", found, "Set student.path, or student.lora.")
    return weights


def load_weights(key: str, model: torch.nn.Module, path: Path) -> None:
    """Put a checkpoint's student weights into a model, whose weights that training never changed stay."""
    model.load_state_dict(check_weights(key, model, path), strict=False)
