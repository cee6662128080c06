"""Compute attention over a packed layout, and put it in the place of a Hugging Face model's own.

Hugging Face's attention knows rows with padding, not a tree of tokens. `PackedForward` replaces it in any body, and
the layers of `llama` call `attend` directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import AttentionInterface

from lit_opd.functional.head import compute_dtype
from lit_opd.functional.precision import upcast
from lit_opd.models.packed_mixers import by_rows, mixers
from lit_opd.models.packing import Layout, gather_rows

__all__ = ["Attend", "attend", "packed_layers", "unsupported"]

Attend = Callable[[Tensor, Tensor, Tensor, Layout, float, int | None, float], Tensor]
"""A way to compute attention, with the arguments of `attend`."""

NAME = "lit_opd_packed"
# Bytes of attention weights under which plain products beat PyTorch's fused kernel on a CPU: its backward pass is slow.
_PLAIN_BYTES = 64 * 2**20
# Devices whose fused kernel takes a mask together with keys that heads share (`enable_gqa`). On CUDA PyTorch falls back
# to a kernel that makes all weights at once, so that keys are repeated there instead.
_SHARING = {"cpu"}
# Keywords that Hugging Face layers pass and that do not change which token sees which.
_HARMLESS = {"cache_position", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits",
             "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache"}  # fmt: skip
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def attend(
    query_NHD: Tensor,
    key_NGD: Tensor,
    value_NGE: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
    dropped: float = 0.0,
) -> Tensor:
    """Let every token of a layout attend to itself and to the tokens that lead to it.

    Args:
        query_NHD: queries of H heads.
        key_NGD: keys of G groups of heads, with G a divisor of H.
        value_NGE: values; in a few architectures E is not D.
        layout: which tokens see which.
        scale: factor on the products.
        window: a query sees at most this many keys, itself included; None for all.
        dropped: probability of dropout on the weights.

    Returns:
        [N, H, E] in the dtype of the inputs.
    """
    # Laid out as [segment, head, place, D].
    query, key, value = (
        gather_rows(values, index).transpose(1, 2)
        for values, index in ((query_NHD, layout.queries_SL), (key_NGD, layout.keys_SM), (value_NGE, layout.keys_SM))
    )
    segments, heads, length, _ = query.shape
    if query.device.type == "cpu" and segments * heads * length * key.shape[2] * 4 <= _PLAIN_BYTES:
        mixed = _plain(query, key, value, layout.bias(query_NHD.dtype, window), scale, dropped)
    else:
        mixed = _fused(query, key, value, layout.within_SLM(window), scale, dropped)
    mixed_SLHE = mixed.view(segments, heads, length, value.shape[-1]).transpose(1, 2)
    return mixed_SLHE.reshape(-1, heads, value.shape[-1])[layout.place_N]


def _fused(query: Tensor, key: Tensor, value: Tensor, seen_SLM: Tensor, scale: float, dropped: float) -> Tensor:
    """Attend with PyTorch's kernels: [S, H, L, D] by [S, G, M, D] and [S, G, M, E] to [S, H, L, E]."""
    repeats = query.shape[1] // key.shape[1]
    shared = repeats > 1 and query.device.type in _SHARING
    if repeats > 1 and not shared:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, seen_SLM[:, None], dropped, scale=scale, enable_gqa=shared)


def _plain(query: Tensor, key: Tensor, value: Tensor, bias_SLM: Tensor, scale: float, dropped: float) -> Tensor:
    """Attend with plain products: [S, H, L, D] by [S, G, M, D] and [S, G, M, E] to [S, G, H / G x L, E]."""
    if dropped:  # dropout draws anew each time, so the weights cannot be recomputed in the backward pass
        return dropout(_weights(query, key, bias_SLM, scale), dropped).to(value.dtype) @ value
    return _PlainAttention.apply(query, key, value, bias_SLM, scale)


def _weights(query: Tensor, key: Tensor, bias_SLM: Tensor, scale: float) -> Tensor:
    """Compute attention weights [S, G, H / G x L, M] in fp32 (float64 stays)."""
    segments, groups, keys, size = key.shape
    # In fp32, and autocast off, which would cast back: large scores rounded to bf16 change weights by several per cent.
    # The queries of a key's group lie side by side, so that the key is read once for all of them.
    with torch.autocast(query.device.type, enabled=False):
        scores = upcast(query * scale).reshape(segments, groups, -1, size) @ upcast(key).transpose(-1, -2)
    scores.view(segments, groups, -1, query.shape[2], keys).add_(bias_SLM[:, None, None])
    return torch.softmax(scores, dim=-1)


class _PlainAttention(torch.autograd.Function):
    """Attention that keeps queries, keys and values, and recomputes its weights in the backward pass.

    The weights are the largest tensor that a layer makes.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias_SLM: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, bias_SLM)
        ctx.scale = scale
        return _weights(query, key, bias_SLM, scale).to(value.dtype) @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias_SLM = ctx.saved_tensors
        weights = _weights(query, key, bias_SLM, ctx.scale)
        to_value = weights.to(value.dtype).transpose(-1, -2) @ upstream
        to_weights = upcast(upstream @ value.transpose(-1, -2)).mul_(weights)
        to_scores = to_weights.addcmul_(weights, to_weights.sum(-1, keepdim=True), value=-1).to(query.dtype)
        to_query = (to_scores @ key).view_as(query) * ctx.scale
        to_key = to_scores.transpose(-1, -2) @ (query * ctx.scale).reshape(*key.shape[:2], -1, key.shape[-1])
        return to_query, to_key, to_value, None, None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    attend: Attend = attend,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Call `attend` as Hugging Face layers call their attention: [1, H, N, D] in, [1, N, H, E] out."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}")
    dtype = compute_dtype(value)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, layout, scale, sliding_window, dropout)[None], None


# No mask is registered by this name, so that transformers makes none: to make one, it would read positions from the
# device, and wait for it.
AttentionInterface.register(NAME, _attention)


def unsupported(body: Any) -> str | None:
    """Say why a body's attention cannot be replaced, None where its configuration speaks of no reason."""
    linear = bool(mixers(body))
    # The flag of the hybrids is off, although they call the attention that their configuration names.
    if not (getattr(body, "_supports_attention_backend", False) or linear):
        return "its attention cannot be replaced"
    known = _KNOWN_LAYERS | {"linear_attention"} if linear else _KNOWN_LAYERS
    layers = set(getattr(body.config, "layer_types", None) or ())
    if layers - known:
        return f"it has layers of type {', '.join(sorted(layers - known))}"
    return None


@contextmanager
def packed_layers(body: Any, layout: Layout) -> Iterator[None]:
    """Make the body's layers take `layout=` and `attend=`, and attend by these, while the context is open.

    Layers that gradient checkpointing computes again attend so then, too, when the context has long been closed.
    """
    marked = [part for part in body.modules() if getattr(part, "gradient_checkpointing", False)]
    name = "_gradient_checkpointing_func"  # absent from a layer until `set_dropout` gives it one
    recomputing = {part: getattr(part, name) for part in marked if hasattr(part, name)}
    for part, function in recomputing.items():
        part._gradient_checkpointing_func = partial(_packed_both_times, body, layout, function)
    try:
        with _packed_attention(body, layout):
            yield
    finally:
        for part, function in recomputing.items():
            part._gradient_checkpointing_func = function


@contextmanager
def _packed_attention(body: Any, layout: Layout) -> Iterator[None]:
    own = body.config._attn_implementation
    body.config._attn_implementation = NAME
    try:
        with by_rows(mixers(body), layout):
            yield
    finally:
        body.config._attn_implementation = own


def _packed_both_times(
    body: Any, layout: Layout, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any
) -> Any:
    def run(*args: Any) -> Any:
        first = body.config._attn_implementation == NAME
        with nullcontext() if first else _packed_attention(body, layout):
            return layer(*args)

    return checkpoint(run, *args)
