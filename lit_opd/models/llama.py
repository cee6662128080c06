"""Run the layers of Llama, and of models built like it, over a packed layout.

The mathematics is that of the Hugging Face body. Norm, gated activation (`layer_parts`) and attention use less memory
here, for they keep only their inputs and compute the rest again in the backward pass. `LlamaForward` trains and scores
with these layers, `FusedDecoder` samples with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lit_opd.models.layer_parts import PLAIN, Parts, Turn, rms_norm
from lit_opd.models.packed_attention import Attend, attend
from lit_opd.models.packing import Layout
from lit_opd.models.recomputed import made_by

__all__ = [
    "LayerProducts", "Turn", "has_hooks", "is_tied", "llama_hidden", "rms_norm", "rotation", "run_layer",
    "tied_embedding", "unlike_llama", "window_of",
]  # fmt: skip

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotations that depend on the position alone. Others also depend on the length of the sequence.
_ROTATIONS = {"default", "linear", "llama3", "yarn"}
# Models whose code is known to compute what Llama's does. Others are compared by numbers, and need fp32 weights for it:
# rounding to bf16 would hide a factor on a residual, or a layer without rotation.
_PROVEN = {"llama", "mistral", "qwen2", "qwen3"}
# Models whose code is known to use a window as `window_of` reads it. A comparison on a few tokens meets no window.
_WINDOWED = {"cwm", "ministral", "mistral", "qwen2", "qwen3", "smollm3"}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def unlike_llama(body: Any) -> str | None:
    """Say how a body's structure differs from Llama's, None where it does not.

    Bodies of equal structure may still scale differently, so the caller compares numbers too.
    """
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return "its body is not built like Llama's"
    kind = getattr(body.rotary_emb, "rope_type", None)
    if not isinstance(kind, str) or kind not in _ROTATIONS:  # some models have one for each kind of layer
        return "its positions are not rotations like Llama's"
    if "llama_4_scaling_beta" in (getattr(body.config, "rope_parameters", None) or ()):
        return "its queries are scaled where they stand late"
    parts, norms = [body], [body.norm]
    for layer in body.layers:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if _children(layer) != _LAYER or _children(attention) - {"q_norm", "k_norm"} != _ATTENTION:
            return "its layers are not built like Llama's"
        if _children(mlp) != _MLP:
            return "its layers have another MLP"
        if window_of(attention) and body.config.model_type not in _WINDOWED:
            return "its attention has windows"
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


def window_of(attention: Any) -> int | None:
    """Tell how many tokens a query sees, itself included, None where it sees all before it."""
    # Mistral's layers read the window off the configuration, those of others keep it: not every layer has one.
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


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
    body: Any,
    layout: Layout,
    dtype: torch.dtype,
    embedded_NH: Tensor | None = None,
    attend: Attend = attend,
    parts: Parts = PLAIN,
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
        # A checkpoint cannot see what `made_by` keeps, and would keep that too.
        run = partial(run, replace(parts, lean=parts.lean and not twice))
        hidden_NH = checkpoint(run, hidden_NH, use_reentrant=False) if twice else run(hidden_NH)
    return parts.norm(hidden_NH, body.norm, hidden_NH.dtype)


def _run_packed(
    layer: Any,
    products: LayerProducts,
    layout: Layout,
    turn: Turn,
    dtype: torch.dtype,
    attend: Attend,
    parts: Parts,
    hidden_NH: Tensor,
) -> Tensor:
    own = layer.self_attn
    dropped = own.attention_dropout if own.training else 0.0

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, layout, own.scaling, window_of(own), dropped)

    return run_layer(layer, products, hidden_NH, turn, attention, dtype, parts)


def rotation(body: Any, positions_N: Tensor, like: Tensor) -> Turn:
    """Make cosine and signed sine [N, 1, D], which turn queries and keys at these positions."""
    cos, sin = body.rotary_emb(like, positions_N[None])
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)


def run_layer(
    layer: Any,
    products: LayerProducts,
    hidden_NH: Tensor,
    turn: Turn,
    attention: Attention,
    dtype: torch.dtype,
    parts: Parts = PLAIN,
) -> Tensor:
    """Run one layer on the residual stream and return the new stream [N, H].

    Args:
        layer: the module, for its norms and sizes.
        products: its matrix products.
        hidden_NH: the residual stream.
        turn: from `rotation`.
        attention: maps queries [N, heads, D], keys and values [N, groups, D] to [N, heads, D].
        dtype: of the matrix products.
        parts: what the layer does outside of its products, by default in plain torch.
    """
    own, rows, lean = layer.self_attn, len(hidden_NH), parts.lean and torch.is_grad_enabled()
    with made_by(lean, parts.norm, hidden_NH, layer.input_layernorm, dtype) as normed:
        qk, value = products.qk_v(normed)
    qk, value = qk.view(rows, -1, own.head_dim), value.reshape(rows, -1, own.head_dim)
    heads, worth = qk.shape[1] - value.shape[1], lean and hasattr(own, "q_norm")  # else nothing but `qk` would be kept
    with made_by(worth, parts.turned, qk, heads, own, turn, dtype) as (query, key):
        hidden_NH = hidden_NH + products.out(attention(query, key, value).reshape(rows, -1))
    with made_by(lean, parts.norm, hidden_NH, layer.post_attention_layernorm, dtype) as normed:
        gate, up = products.gate_up(normed)
    with made_by(lean, parts.activated, gate, up, layer.mlp) as activated:
        return hidden_NH + products.down(activated)
