"""Keep dropout out of training, also where layers are computed twice.

A sampler runs without dropout. A training pass with it gives the same tokens other log-probabilities, those of a
student that sampled nothing. `load_student` marks layers here, and `Pair` sets every student.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_opd.errors import UserError

__all__ = ["compute_layers_twice", "set_dropout"]


def compute_layers_twice(model: nn.Module) -> None:
    """Mark the layers whose activations are to be computed again in the backward pass, for `set_dropout`.

    Raises:
        UserError: the model has no layers that can be.
    """
    layers = _layers(model)
    if not layers:
        found = f"true for {type(model).__name__}, none of whose layers can be computed twice"
        raise UserError("student.gradient_checkpointing", "false", found, "Lower optim.micro_batch_tokens instead.")
    for layer in layers:
        layer.gradient_checkpointing = True


def set_dropout(model: nn.Module, keep: bool) -> None:
    """Set train mode where dropout is kept, else eval mode, and keep layers computed twice that were so.

    All that transformers and peft do in training only (dropout as module or function, noise in routers, layers left
    out) reads a module's own mode, so that no name of an option needs to be known.
    """
    model.train(keep)
    for layer in _layers(model):
        if layer.gradient_checkpointing:
            # transformers computes a layer twice in train mode only: its own mode says so, and `run` has the other.
            layer.training = True
            layer._gradient_checkpointing_func = partial(_compute_twice, layer, keep)


def _compute_twice(layer: nn.Module, training: bool, function: Callable[..., Any], *args: Any) -> Any:
    def run(*args: Any) -> Any:
        layer.training = training
        try:
            return function(*args)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)


def _layers(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
