"""Attend from one new token a row to the columns of a cache, each row from its own first column.

A dense kernel reads every column of the buffer for every row. This one reads the columns that a row has, shares each
key among the heads of its group, and splits long rows among programs, so that few rows fill a device too. The parts of
a row are merged by their log-sum-exp (FlashDecoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_attention"]

_BLOCK = 64
# Programs that keep a large device busy: about two for each of 132 multiprocessors.
_PROGRAMS = 264


def decode_attention(
    query_BHD: Tensor, keys_BGMD: Tensor, values_BGMD: Tensor, first_B: Tensor, column: Tensor, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention [B, H, D] in the dtype of the queries.

    Args:
        query_BHD: queries of H heads.
        keys_BGMD: keys of G groups of heads at M columns, of which a row sees those from `first_B` to `column`.
        values_BGMD: values.
        first_B: int64, the first column of each row.
        column: int64 scalar on the device, the last column of all rows.
        scale: factor on the products.
        window: a query sees at most this many columns, its own included; None for all.
    """
    rows, heads, size = query_BHD.shape
    groups, columns = keys_BGMD.shape[1:3]
    parts = max(1, min(triton.cdiv(_PROGRAMS, rows * groups), triton.cdiv(columns, _BLOCK)))
    span = triton.cdiv(triton.cdiv(columns, parts), _BLOCK) * _BLOCK
    partial = query_BHD.new_empty(rows, heads, parts, size, dtype=torch.float32)
    norms = query_BHD.new_empty(2, rows, heads, parts, dtype=torch.float32)
    mixed = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    shares, wide = heads // groups, triton.next_power_of_2(size)
    _attend[(rows, groups, parts)](
        query_BHD, keys_BGMD, values_BGMD, first_B, column, partial, *norms, scale, window or columns,
        *query_BHD.stride()[:2], *keys_BGMD.stride()[:3], *values_BGMD.stride()[:3], span,
        SHARES=shares, PADDED=max(16, triton.next_power_of_2(shares)), SIZE=size, WIDE=wide, BLOCK=_BLOCK,
    )  # fmt: skip
    _merge[(rows * heads,)](
        partial, *norms, mixed, parts, SIZE=size, WIDE=wide, PARTS=triton.next_power_of_2(parts)
    )  # fmt: skip
    return mixed


@triton.jit
def _attend(
    query, key, value, first, column, partial, peak, total, scale, window,
    query_row, query_head, key_row, key_group, key_column, value_row, value_group, value_column, span,
    SHARES: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    share, place = tl.arange(0, PADDED), tl.arange(0, WIDE)
    head = group * SHARES + share
    known = (share < SHARES)[:, None] & (place < SIZE)[None, :]
    asked = tl.load(query + row * query_row + head[:, None] * query_head + place[None, :], mask=known, other=0.0)
    end = tl.load(column) + 1
    begin = tl.maximum(tl.maximum(tl.load(first + row), end - window), part * span)
    stop = tl.minimum(end, (part + 1) * span)
    highest = tl.full([PADDED], float("-inf"), tl.float32)
    mass = tl.zeros([PADDED], tl.float32)
    mixed = tl.zeros([PADDED, WIDE], tl.float32)
    key += row * key_row + group * key_group
    value += row * value_row + group * value_group
    for start in range(begin, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        seen = columns < stop
        inside = (place < SIZE)[:, None] & seen[None, :]
        keys = tl.load(key + columns[None, :] * key_column + place[:, None], mask=inside, other=0.0)
        scores = tl.dot(asked, keys, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        faded = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        mass = mass * faded + tl.sum(weights, 1)
        inside = seen[:, None] & (place < SIZE)[None, :]
        values = tl.load(value + columns[:, None] * value_column + place[None, :], mask=inside, other=0.0)
        mixed = mixed * faded[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest
    parts, heads = tl.num_programs(2), tl.num_programs(1) * SHARES
    slot = (row * heads + head) * parts + part
    tl.store(partial + slot[:, None] * SIZE + place[None, :], mixed, mask=known)
    tl.store(peak + slot, highest, mask=share < SHARES)
    tl.store(total + slot, mass, mask=share < SHARES)


@triton.jit
def _merge(
    partial, peak, total, mixed, parts, SIZE: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    part, place = tl.arange(0, PARTS), tl.arange(0, WIDE)
    exists = part < parts
    peaks = tl.load(peak + slot * parts + part, mask=exists, other=float("-inf"))
    # A part that begins after the present column has seen nothing: its peak is -inf, and its weight 0.
    factors = tl.exp(peaks - tl.max(peaks, 0))
    mass = tl.sum(factors * tl.load(total + slot * parts + part, mask=exists, other=0.0), 0)
    inside = exists[:, None] & (place < SIZE)[None, :]
    found = tl.load(partial + (slot * parts + part[:, None]) * SIZE + place[None, :], mask=inside, other=0.0)
    merged = tl.sum(found * factors[:, None], 0) / mass
    tl.store(mixed + slot * SIZE + place, merged.to(mixed.dtype.element_ty), mask=place < SIZE)
