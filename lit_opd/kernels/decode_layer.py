"""Do what a layer does to one new token a row outside of its matrix products, in one pass each.

A token's activations are a few kilobytes, so that starting a kernel takes longer than its work: what torch does in five
to ten small operations is one here. The plain functions are `rms_norm`, `rotation` and `run_layer` of `models.llama`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_and_norm", "gated_silu", "rotate_and_store"]

_BLOCK = 1024


def add_and_norm(
    hidden_BH: Tensor, added_BH: Tensor | None, weight_H: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """Add to the residual stream [B, H] in place, and return its root-mean-square norm in `dtype`, computed in fp32."""
    normed = torch.empty_like(hidden_BH, dtype=dtype)
    rows, width = hidden_BH.shape
    _add_and_norm[(rows,)](
        hidden_BH, hidden_BH if added_BH is None else added_BH, weight_H, normed, epsilon, width,
        ADDS=added_BH is not None, WIDE=triton.next_power_of_2(width),
    )  # fmt: skip
    return normed


@triton.jit
def _add_and_norm(hidden, added, weight, normed, epsilon, width, ADDS: tl.constexpr, WIDE: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside = place < width
    stream = tl.load(hidden + row * width + place, mask=inside, other=0.0)
    if ADDS:
        more = tl.load(added + row * width + place, mask=inside, other=0.0)
        stream = (stream.to(tl.float32) + more.to(tl.float32)).to(stream.dtype)
        tl.store(hidden + row * width + place, stream, mask=inside)
    wide = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    # Rounded to the dtype of the stream before the weight is applied, as the plain norm does.
    scaled = (wide * scale).to(stream.dtype).to(tl.float32)
    factors = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + place, (scaled * factors).to(normed.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv_BF: Tensor, turn: tuple[Tensor, Tensor], place_B: Tensor, column: Tensor, cache: Tensor, heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Turn queries and keys by their positions, put keys and values into the cache, and return queries [B, H, D].

    Args:
        qkv_BF: queries of H heads, keys and values of G groups of a token a row, side by side.
        turn: fp32 tables [L, D] of cosines and of signed sines, as `models.llama.rotation` makes them.
        place_B: int64, the position of each row's token.
        column: int64 scalar on the device, the column of the cache to write.
        cache: [2, B, G, M, D], keys and values.
        heads: H.
        norms: weights [D] of the norms of queries and keys, and their epsilon, where a model has such norms.
    """
    (_, rows, groups, _, size), (cos, sin) = cache.shape, turn
    query = qkv_BF.new_empty(rows, heads, size, dtype=cache.dtype)
    q_norm, k_norm, epsilon = (cos, cos, 0.0) if norms is None else norms
    _rotate_and_store[(rows, heads + 2 * groups)](
        qkv_BF, cos, sin, place_B, column, query, cache, q_norm, k_norm, epsilon, qkv_BF.stride(0), *cache.stride()[:4],
        HEADS=heads, GROUPS=groups, SIZE=size, WIDE=triton.next_power_of_2(size), NORMS=norms is not None,
    )  # fmt: skip
    return query


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, places, column, query, cache, q_norm, k_norm, epsilon, qkv_row,
    cache_side, cache_row, cache_group, cache_column,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, half = tl.arange(0, WIDE), SIZE // 2
    inside = place < SIZE
    partner = tl.where(place < half, place + half, place - half)
    source = qkv + row * qkv_row + head * SIZE
    mine = tl.load(source + place, mask=inside, other=0.0)
    kind = mine.dtype
    if head < HEADS + GROUPS:
        other = tl.load(source + partner, mask=inside, other=0.0)
        if NORMS:
            wide = mine.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
            weight = q_norm if head < HEADS else k_norm
            own_factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
            other_factor = tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
            mine = ((wide * scale).to(kind).to(tl.float32) * own_factor).to(kind)
            other = ((other.to(tl.float32) * scale).to(kind).to(tl.float32) * other_factor).to(kind)
        at = tl.load(places + row) * SIZE
        own_cos = tl.load(cos + at + place, mask=inside, other=0.0).to(tl.float32)
        own_sin = tl.load(sin + at + place, mask=inside, other=0.0).to(tl.float32)
        mine = (mine.to(tl.float32) * own_cos + other.to(tl.float32) * own_sin).to(kind)
    if head < HEADS:
        target = query + (row * HEADS + head) * SIZE
    else:
        side = (head >= HEADS + GROUPS).to(tl.int64)
        group = (head - HEADS - side * GROUPS).to(tl.int64)
        target = cache + side * cache_side + row * cache_row + group * cache_group + tl.load(column) * cache_column
    tl.store(target + place, mine.to(query.dtype.element_ty), mask=inside)


def gated_silu(gate_up_BF: Tensor) -> Tensor:
    """Compute silu(gate) x up, [B, I], of a tensor that holds both side by side."""
    rows, both = gate_up_BF.shape
    inner = gate_up_BF.new_empty(rows, both // 2)
    grid = (rows, triton.cdiv(both // 2, _BLOCK))
    _gated_silu[grid](gate_up_BF, inner, gate_up_BF.stride(0), both // 2, BLOCK=_BLOCK)
    return inner


@triton.jit
def _gated_silu(gate_up, inner, gate_up_row, width, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(gate_up + row * gate_up_row + place, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_up_row + width + place, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded between the two factors, as the plain activation is.
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(inner + row * width + place, product.to(gate.dtype), mask=inside)
