"""Run what a layer of Llama does outside of its products through the kernels of `lit_opd.kernels.layer`.

Each class is the kernel's counterpart of a plain function in `layer_parts`, with the same values and gradients up to
rounding. `prove_parts` decides on a probe which of the two a model takes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_opd.fast_paths import Verdict, prove
from lit_opd.functional.head import compute_dtype
from lit_opd.kernels import why_not
from lit_opd.models.forward import LlamaForward
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.layer_parts import PLAIN, Parts, Turn, is_silu
from lit_opd.models.llama import LayerProducts, rotation, run_layer

__all__ = ["FUSED", "prove_parts"]

NAME = "fused layers"
# In bf16, whose numbers have eight bits. The plain functions round between their steps, the kernels mostly do not.
BOUND = 0.03
_MOST = 16384  # tokens of a probe


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        from lit_opd.kernels.layer import norm

        rows = x.contiguous()
        normed, scale_N = norm(rows, weight, epsilon, dtype)
        ctx.save_for_backward(rows, weight, scale_N)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        from lit_opd.kernels.layer import norm_backward

        to_x, to_weight = norm_backward(upstream.contiguous(), *ctx.saved_tensors)
        return to_x, to_weight if ctx.needs_input_grad[1] else None, None, None


class _Turned(torch.autograd.Function):
    """Norm queries and keys, where there are two weights, rotate them, and give them out apart."""

    @staticmethod
    def forward(
        ctx: Any, qk: Tensor, heads: int, turn: Turn, epsilon: float, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        from lit_opd.kernels.layer import turned

        rows, cos, sin = (x.contiguous() for x in (qk, *turn))
        out, scale_NA = turned(rows, heads, (cos, sin), weights, epsilon)
        ctx.save_for_backward(rows if weights else rows.new_empty(0), scale_NA, cos, sin, *weights)
        ctx.heads = heads
        return out[:, :heads], out[:, heads:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_query: Tensor, to_key: Tensor) -> tuple[Tensor | None, ...]:
        from lit_opd.kernels.layer import turned_backward

        qk, scale_NA, cos, sin, *weights = ctx.saved_tensors
        upstream = torch.cat([to_query, to_key], dim=1)
        to_qk, sums = turned_backward(upstream, qk, scale_NA, ctx.heads, (cos, sin), weights)
        return to_qk, None, None, None, *(to.to(own.dtype) for to, own in zip(sums, weights, strict=False))


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from lit_opd.kernels.layer import gated_silu

        gate, up = gate.contiguous(), up.contiguous()  # as the backward kernel reads them
        ctx.save_for_backward(gate, up)
        return gated_silu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        from lit_opd.kernels.layer import gated_silu_backward

        return gated_silu_backward(upstream.contiguous(), *ctx.saved_tensors)


def _norm(x: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    return _Norm.apply(x, norm.weight, norm.variance_epsilon, dtype)


def _turned(qk: Tensor, heads: int, own: Any, turn: Turn, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not hasattr(own, "q_norm"):
        return _Turned.apply(qk, heads, turn, 0.0)
    return _Turned.apply(qk, heads, turn, own.q_norm.variance_epsilon, own.q_norm.weight, own.k_norm.weight)


def _activated(gate: Tensor, up: Tensor, mlp: Any) -> Tensor:
    return _GatedSilu.apply(gate, up)


FUSED = Parts(_norm, _turned, _activated, lean=True)


def prove_parts(model: LanguageModel, tokens: int, choice: str = "auto") -> Verdict:
    """Prove the kernels on the last layer of a model and random hidden states, and let the model run by them.

    Call it under the autocast in which the model will run.

    Args:
        model: which runs packed, or not by these layers at all.
        tokens: how many, those of a micro-batch.
        choice: as in `lit_opd.fast_paths.prove`.

    Raises:
        UserError: the choice is `fast`, and the kernels are unfit, fail or differ.
    """
    forward, device = model.forward, model.head.weight_VH.device
    if not isinstance(forward, LlamaForward):
        return prove(NAME, list, list, BOUND, device, choice, "it is not run by this package's layers")
    with model.present():
        plain, fast = (partial(_outputs, model, parts, min(tokens, _MOST)) for parts in (PLAIN, FUSED))
        verdict = prove(NAME, plain, fast, BOUND, device, choice, why_not(device) or _beyond(model.body))
    forward.parts = FUSED if verdict.taken else PLAIN
    return verdict


def _beyond(body: Any) -> str | None:
    if body.embed_tokens.weight.dtype == torch.float64:
        return "its weights are float64"
    return None if all(is_silu(layer.mlp.act_fn) for layer in body.layers) else "its activation is not SiLU"


def _outputs(model: LanguageModel, parts: Parts, tokens: int) -> list[Tensor]:
    """Compute what a layer adds to its input, and the gradients, with a sum in the place of attention."""
    body, device = model.body, model.head.weight_VH.device
    layer, dtype = body.layers[-1], body.embed_tokens.weight.dtype
    generator = torch.Generator(device).manual_seed(0)
    hidden, upstream = torch.randn(2, tokens, body.config.hidden_size, generator=generator, device=device).to(dtype)
    modules = [m for m in (*layer.children(), *layer.self_attn.children()) if hasattr(m, "variance_epsilon")]
    sources = [hidden.requires_grad_(), *(m.weight for m in modules if m.weight.requires_grad)]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query * (key + value).repeat_interleave(query.shape[1] // key.shape[1], 1)

    with model.precision(), torch.enable_grad():
        turn = rotation(body, torch.arange(tokens, device=device), hidden.detach())
        products, low = LayerProducts.of(layer), compute_dtype(model.output_layer.weight[:0])
        added = run_layer(layer, products, hidden, turn, attention, low, parts) - hidden
    return [added, *torch.autograd.grad(added, sources, upstream)]
