"""Do what a layer does to one new token a row outside of its matrix products, in one pass each.

A token's activations are a few kilobytes, so that starting a kernel takes longer than its work: what torch does in five
to ten small operations is one here. The plain functions are those of `models.llama` and `rollout.token_parts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gated_silu", "rms_norm", "rotate_and_store"]

_BLOCK = 1024


def rms_norm(x_RH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Compute the root-mean-square norm of every row in fp32, and return it in `dtype`."""
    normed = torch.empty_like(x_RH, dtype=dtype)
    rows, width = x_RH.shape
    _rms_norm[(rows,)](x_RH, weight_H, normed, epsilon, x_RH.stride(0), width, WIDE=triton.next_power_of_2(width))
    return normed


@triton.jit
def _rms_norm(x, weight, normed, epsilon, x_row, width, WIDE: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside = place < width
    own = tl.load(x + row * x_row + place, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    # Rounded to the dtype of the input before the weight is applied, as the plain norm does.
    scaled = (wide * scale).to(own.dtype).to(tl.float32)
    factors = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + place, (scaled * factors).to(normed.dtype.element_ty), mask=inside)


def rotate_and_store(
    qk_BND: Tensor, value_BGD: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor, column: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Norm and rotate queries and keys, put keys and values into the cache, and return queries [B, H, D].

    Args:
        qk_BND: [B, H + G, D] queries of H heads, then keys of G groups; rows may be parts of longer ones.
        value_BGD: values; likewise.
        turn: fp32 cosines and signed sines [B, 1, D], as `models.llama.rotation` makes them.
        cache: [2, B, G, M, D], keys and values, written in place.
        column: int64 [1] on the device, the column of the cache to write.
        norms: weights [D] of the norms of queries and keys, and their epsilon, where a model has such norms.
    """
    (rows, both, size), groups, (cos, sin) = qk_BND.shape, value_BGD.shape[1], turn
    query = torch.empty(rows, both - groups, size, dtype=cache.dtype, device=cache.device)
    q_norm, k_norm, epsilon = (cos, cos, 0.0) if norms is None else norms
    _rotate_and_store[(rows, both + groups)](
        qk_BND, value_BGD, cos, sin, column, query, cache, q_norm, k_norm, epsilon,
        *qk_BND.stride()[:2], *value_BGD.stride()[:2], *cache.stride()[:4],
        HEADS=both - groups, GROUPS=groups, SIZE=size, WIDE=triton.next_power_of_2(size), NORMS=norms is not None,
    )  # fmt: skip
    return query


@triton.jit
def _rotate_and_store(
    qk, value, cos, sin, column, query, cache, q_norm, k_norm, epsilon, qk_row, qk_head, value_row, value_group,
    cache_side, cache_row, cache_group, cache_column,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place, half = tl.arange(0, WIDE), SIZE // 2
    inside = place < SIZE
    group = head - HEADS
    slot = cache + row * cache_row + tl.load(column) * cache_column
    if head >= HEADS + GROUPS:
        group -= GROUPS
        kept = tl.load(value + row * value_row + group * value_group + place, mask=inside, other=0.0)
        tl.store(slot + cache_side + group * cache_group + place, kept.to(cache.dtype.element_ty), mask=inside)
    else:
        source, partner = qk + row * qk_row + head * qk_head, tl.where(place < half, place + half, place - half)
        mine = tl.load(source + place, mask=inside, other=0.0)
        other = tl.load(source + partner, mask=inside, other=0.0)
        kind = mine.dtype
        if NORMS:
            wide = mine.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
            is_query = head < HEADS
            own_factor = _factor(q_norm, k_norm, is_query, place, inside)
            other_factor = _factor(q_norm, k_norm, is_query, partner, inside)
            mine = ((wide * scale).to(kind).to(tl.float32) * own_factor).to(kind)
            other = ((other.to(tl.float32) * scale).to(kind).to(tl.float32) * other_factor).to(kind)
        own_cos = tl.load(cos + row * SIZE + place, mask=inside, other=0.0).to(tl.float32)
        own_sin = tl.load(sin + row * SIZE + place, mask=inside, other=0.0).to(tl.float32)
        turned = mine.to(tl.float32) * own_cos + other.to(tl.float32) * own_sin
        if head < HEADS:
            tl.store(query + (row * HEADS + head) * SIZE + place, turned.to(query.dtype.element_ty), mask=inside)
        else:
            tl.store(slot + group * cache_group + place, turned.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _factor(q_norm, k_norm, is_query, place, inside):
    """Read the weights of one of two norms: a pointer cannot depend on a value that a kernel computes."""
    of_query = tl.load(q_norm + place, mask=inside, other=0.0)
    of_key = tl.load(k_norm + place, mask=inside, other=0.0)
    return tl.where(is_query, of_query, of_key).to(tl.float32)


def gated_silu(gate_BI: Tensor, up_BI: Tensor) -> Tensor:
    """Compute silu(gate) x up, [B, I]. Rows may be parts of longer ones."""
    rows, width = gate_BI.shape
    inner = torch.empty(rows, width, dtype=gate_BI.dtype, device=gate_BI.device)
    _gated_silu[(rows, triton.cdiv(width, _BLOCK))](
        gate_BI, up_BI, inner, gate_BI.stride(0), up_BI.stride(0), width, BLOCK=_BLOCK
    )  # fmt: skip
    return inner


@triton.jit
def _gated_silu(gate, up, inner, gate_row, up_row, width, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    mine = tl.load(gate + row * gate_row + place, mask=inside, other=0.0)
    factor = tl.load(up + row * up_row + place, mask=inside, other=0.0)
    wide = mine.to(tl.float32)
    # Rounded between the two factors, as the plain activation is.
    activated = (wide / (1.0 + tl.exp(-wide))).to(mine.dtype)
    product = activated.to(tl.float32) * factor.to(tl.float32)
    tl.store(inner + row * width + place, product.to(mine.dtype), mask=inside)
