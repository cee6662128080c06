"""Norm, rotate and store queries, keys and values of one new token a row, in one pass.

A token's activations are a few kilobytes, so that starting a kernel takes longer than its work: what torch does in some
ten small operations is one here. The plain function is that of `rollout.token_parts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_opd.kernels.layer import pick_weights

__all__ = ["rotate_and_store"]


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
            own_factor = pick_weights(q_norm, k_norm, is_query, place, inside)
            other_factor = pick_weights(q_norm, k_norm, is_query, partner, inside)
            mine = ((wide * scale).to(kind).to(tl.float32) * own_factor).to(kind)
            other = ((other.to(tl.float32) * scale).to(kind).to(tl.float32) * other_factor).to(kind)
        own_cos = tl.load(cos + row * SIZE + place, mask=inside, other=0.0).to(tl.float32)
        own_sin = tl.load(sin + row * SIZE + place, mask=inside, other=0.0).to(tl.float32)
        turned = mine.to(tl.float32) * own_cos + other.to(tl.float32) * own_sin
        if head < HEADS:
            tl.store(query + (row * HEADS + head) * SIZE + place, turned.to(query.dtype.element_ty), mask=inside)
        else:
            tl.store(slot + group * cache_group + place, turned.to(cache.dtype.element_ty), mask=inside)
