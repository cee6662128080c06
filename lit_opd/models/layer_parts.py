"""Do what a layer of Llama does outside of its matrix products and its attention, in plain torch.

Norm and gated activation use less memory than Hugging Face's, for they keep only their inputs and compute the rest
again in the backward pass. `run_layer` calls these functions, `fused_parts` has the same as kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from lit_opd.functional.precision import upcast

__all__ = ["PLAIN", "Parts", "Turn", "is_silu", "normed", "rms_norm", "rotated"]

Turn = tuple[Tensor, Tensor]
"""Cosine and signed sine [N, 1, D], which turn queries and keys by their positions."""


@dataclass(frozen=True)
class Parts:
    """Hold what a layer does outside of its matrix products and attention, as functions.

    Attributes:
        norm: of x, a norm's module and a dtype, as `rms_norm`.
        turned: norms, where a model has such norms, and rotates: of [N, heads + groups, D] queries and keys, the number
            of heads, the attention's module, the turn and a dtype, to queries and keys.
        activated: of gate, up and the MLP's module, to the input of the last product.
        lean: what follows keeps the inputs of these functions for the backward pass, and not their outputs, which are
            computed again.
    """

    norm: Callable[[Tensor, Any, torch.dtype], Tensor]
    turned: Callable[[Tensor, int, Any, Turn, torch.dtype], tuple[Tensor, Tensor]]
    activated: Callable[[Tensor, Tensor, Any], Tensor]
    lean: bool = False


def _turned(qk: Tensor, heads: int, own: Any, turn: Turn, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if hasattr(own, "q_norm"):
        normed = rms_norm(qk[:, :heads], own.q_norm, dtype), rms_norm(qk[:, heads:], own.k_norm, dtype)
        qk = torch.cat(normed, dim=1)
    qk = rotated(qk, turn, dtype)
    return qk[:, :heads], qk[:, heads:]


def rotated(qk_NAD: Tensor, turn: Turn, dtype: torch.dtype) -> Tensor:
    """Rotate queries and keys [N, A, D] by their positions, in the dtype of the turn, and return them in `dtype`."""
    cos, sin = turn
    wide = qk_NAD.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin).to(dtype)


def is_silu(activation: Any) -> bool:
    """Tell whether an activation is SiLU, by the name of its class: torch and transformers each have one."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _activated(gate: Tensor, up: Tensor, mlp: Any) -> Tensor:
    return _GatedSilu.apply(gate, up) if is_silu(mlp.act_fn) and gate.requires_grad else mlp.act_fn(gate) * up


def rms_norm(x: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """Apply a norm with `weight` and `variance_epsilon`, in fp32 (float64 stays), and return the result in `dtype`."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon, dtype)
    return normed(x, norm.weight, norm.variance_epsilon, dtype)[0]


def normed(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the root-mean-square norm of the last dimension as `rms_norm`, with the factors [..., 1] of rows."""
    wide = upcast(x)
    scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + epsilon)
    return (weight * (wide * scale).to(x.dtype)).to(dtype), scale


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        result, scale = normed(x, weight, epsilon, dtype)
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        scaled, wide = upcast(x) * scale, upcast(upstream)
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (wide * scaled).flatten(0, -2).sum(0).to(weight.dtype)
        inner = wide * weight
        inner -= scaled * (inner * scaled).mean(-1, keepdim=True)
        return inner.mul_(scale).to(x.dtype), to_weight, None, None


class _GatedSilu(torch.autograd.Function):
    """The product silu(gate) x up, which keeps nothing but gate and up for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return to_gate, upstream.mul(silu(gate))


PLAIN = Parts(rms_norm, _turned, _activated)
