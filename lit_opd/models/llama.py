"""Run the layers of Llama, and of models built like it, over a packed layout.

The mathematics is that of the Hugging Face body. Norm, gated activation and attention use less memory here, for they
keep only their inputs and compute the rest again in the backward pass. `LlamaForward` trains and scores with these
layers, `FusedDecoder` samples with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from lit_opd.functional.precision import upcast
from lit_opd.models.packed_attention import Attend, attend
from lit_opd.models.packing import Layout

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotations that depend on the position alone. Others also depend on the length of the sequence.
_ROTATIONS = {"default", "linear", "llama3", "yarn"}
# Models whose code is known to compute what Llama's does. Others are compared by numbers, and need fp32 weights for it:
# rounding to bf16 would hide a factor on a residual, or a layer without rotation.
_PROVEN = {"llama", "mistral", "qwen2", "qwen3"}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Turn = tuple[Tensor, Tensor]


def unlike_llama(body: Any) -> str | None:
    """Say how a body's structure differs from Llama's, None where it does not.

    Bodies of equal structure may still scale differently, so the caller compares numbers too.
    """
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return "its body is not built like Llama's"
    kind = getattr(body.rotary_emb, "rope_type", None)
    if not isinstance(kind, str) or kind not in _ROTATIONS:  # some models have one for each kind of layer
        return "its positions are not rotations like Llama's"
    kinds = set(getattr(body.config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(body.config, "sliding_window", None)):
        return "its attention has windows"
    parts, norms = [body], [body.norm]
    for layer in body.layers:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if _children(layer) != _LAYER or _children(attention) - {"q_norm", "k_norm"} != _ATTENTION:
            return "its layers are not built like Llama's"
        if _children(mlp) != _MLP:
            return "its layers have another MLP"
        parts += [layer, attention, mlp, layer.mlp.act_fn]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    if not all(hasattr(norm, "variance_epsilon") for norm in norms):
        return "its norms are not built like Llama's"
    if body.config.model_type not in _PROVEN and body.embed_tokens.weight.dtype not in (torch.float32, torch.float64):
        return "its weights are too coarse to compare it with Llama"
    if any(type(parameter.data) is not Tensor for parameter in body.parameters()):
        return "its weights are sharded"
    return "it has hooks" if has_hooks(parts + norms) else None


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Tell whether a module has forward hooks, which run only where the module itself is called."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _children(module: nn.Module | None) -> set[str]:
    return set() if module is None else {name for name, _ in module.named_children()}


@dataclass(frozen=True)
class LayerProducts:
    """The matrix products of a layer, as functions of [N, H].

    Attributes:
        qk_v: to queries and keys in one tensor, and to values.
        out: from the output of attention back to the residual stream.
        gate_up: to the two halves of the MLP.
        down: from the MLP back to the residual stream.
    """

    qk_v: Callable[[Tensor], tuple[Tensor, Tensor]]
    out: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], tuple[Tensor, Tensor]]
    down: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: Any) -> LayerProducts:
        """Take the products of a layer's own modules, with their adapters and quantised weights."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            lambda x: (torch.cat([_of(attention.q_proj, x), _of(attention.k_proj, x)], -1), _of(attention.v_proj, x)),
            lambda x: _of(attention.o_proj, x),
            lambda x: (_of(mlp.gate_proj, x), _of(mlp.up_proj, x)),
            lambda x: _of(mlp.down_proj, x),
        )


def _of(module: Any, x: Tensor) -> Tensor:
    if type(module) is nn.Linear and module.weight.dtype != x.dtype and not has_hooks([module]):
        return _CastLinear.apply(x, module.weight, module.bias)
    return module(x)


class _CastLinear(torch.autograd.Function):
    """A product in the dtype of x that casts its weight again in the backward pass.

    The cast weights of all layers, kept for the backward pass, would be a second model in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            upstream @ weight.to(x.dtype) if to_x else None,
            (upstream.T @ x).to(weight.dtype) if to_weight else None,
            upstream.sum(0).to(weight.dtype) if to_bias else None,
        )


def is_tied(embedding: nn.Module, weight_VH: Tensor) -> bool:
    """Tell whether an embedding is a plain look-up in this weight."""
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq
    return plain and embedding.weight is weight_VH and not embedding._forward_hooks


def tied_embedding(ids_N: Tensor, embedding: nn.Embedding) -> tuple[Tensor, Tensor]:
    """Look up embeddings [N, H], and return the same weight for the head.

    The embedding's gradient is then added to the head's in place. By itself it would be a second tensor as large as
    the vocabulary, all but N of whose rows are zero.
    """
    return _TiedEmbedding.apply(ids_N, embedding.weight, embedding.padding_idx)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, weight_VH: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids_N)
        ctx.padding = padding
        return weight_VH[ids_N], weight_VH.view_as(weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_hidden_NH: Tensor, to_weight_VH: Tensor) -> tuple[None, Tensor, None]:
        (ids_N,) = ctx.saved_tensors
        if ctx.padding is not None:  # torch's embedding gives this token no gradient, even where a model wrote it
            to_hidden_NH = to_hidden_NH.masked_fill((ids_N == ctx.padding)[:, None], 0.0)
        # In place, for no other node of the graph has the head's gradient.
        return None, to_weight_VH.index_add_(0, ids_N, to_hidden_NH.to(to_weight_VH.dtype)), None


def llama_hidden(
    body: Any, layout: Layout, dtype: torch.dtype, embedded_NH: Tensor | None = None, attend: Attend = attend
) -> Tensor:
    """Compute hidden states [N, H] of the tokens of a layout.

    The body is one whose `unlike_llama` is None. Matrix products run in `dtype`. Embeddings may be given. Layers that
    are marked for gradient checkpointing keep their input alone and are computed again in the backward pass.
    """
    hidden_NH = body.embed_tokens(layout.ids_N) if embedded_NH is None else embedded_NH
    turn = rotation(body, layout.positions_N, hidden_NH)
    for layer in body.layers:
        run = partial(_run_packed, layer, LayerProducts.of(layer), layout, turn, dtype, attend)
        twice = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
        hidden_NH = checkpoint(run, hidden_NH, use_reentrant=False) if twice else run(hidden_NH)
    return rms_norm(hidden_NH, body.norm, hidden_NH.dtype)


def _run_packed(
    layer: Any,
    products: LayerProducts,
    layout: Layout,
    turn: Turn,
    dtype: torch.dtype,
    attend: Attend,
    hidden_NH: Tensor,
) -> Tensor:
    own = layer.self_attn
    dropped = own.attention_dropout if own.training else 0.0

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, layout, own.scaling, None, dropped)

    return run_layer(layer, products, hidden_NH, turn, attention, dtype)


def rotation(body: Any, positions_N: Tensor, like: Tensor) -> Turn:
    """Make cosine and signed sine [N, 1, D], which turn queries and keys at these positions."""
    cos, sin = body.rotary_emb(like, positions_N[None])
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)


def run_layer(
    layer: Any, products: LayerProducts, hidden_NH: Tensor, turn: Turn, attention: Attention, dtype: torch.dtype
) -> Tensor:
    """Run one layer on the residual stream and return the new stream [N, H].

    Args:
        layer: the module, for its norms and sizes.
        products: its matrix products.
        hidden_NH: the residual stream.
        turn: from `rotation`.
        attention: maps queries [N, heads, D], keys and values [N, groups, D] to [N, heads, D].
        dtype: of the matrix products.
    """
    own, rows = layer.self_attn, len(hidden_NH)
    qk, value = products.qk_v(rms_norm(hidden_NH, layer.input_layernorm, dtype))
    qk, value = qk.view(rows, -1, own.head_dim), value.reshape(rows, -1, own.head_dim)
    groups = value.shape[1]
    heads = qk.shape[1] - groups
    if hasattr(own, "q_norm"):
        parts = rms_norm(qk[:, :heads], own.q_norm, dtype), rms_norm(qk[:, heads:], own.k_norm, dtype)
        qk = torch.cat(parts, dim=1)
    cos, sin = turn
    wide = qk.to(cos.dtype)
    qk = torch.addcmul(wide * cos, wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin).to(dtype)
    mixed = attention(qk[:, :heads], qk[:, heads:], value)
    hidden_NH = hidden_NH + products.out(mixed.reshape(rows, -1))
    gate, up = products.gate_up(rms_norm(hidden_NH, layer.post_attention_layernorm, dtype))
    plain_silu = type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    inner = _GatedSilu.apply(gate, up) if plain_silu and gate.requires_grad else layer.mlp.act_fn(gate) * up
    return hidden_NH + products.down(inner)


def rms_norm(x: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """Apply a norm with `weight` and `variance_epsilon`, in fp32 (float64 stays), and return the result in `dtype`."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon, dtype)
    return _normed(x, norm.weight, norm.variance_epsilon, dtype)[0]


def _normed(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = upcast(x)
    scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + epsilon)
    return (weight * (wide * scale).to(x.dtype)).to(dtype), scale


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        normed, scale = _normed(x, weight, epsilon, dtype)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = upcast(x) * scale, upcast(upstream)
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        inner = wide * weight
        inner -= normed * (inner * normed).mean(-1, keepdim=True)
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
