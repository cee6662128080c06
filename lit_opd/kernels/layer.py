"""Do what a layer does to tokens outside of its matrix products, forward and backward, in one pass each.

These steps are bound by memory: eager torch reads and writes queries and keys some twenty times, in fp32, to norm and
to rotate them, where once is enough. The plain functions, and the autograd functions that call these kernels, are those
of `models.layer_parts` and of `models.fused_parts`. Sums over tokens are made in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gated_silu", "gated_silu_backward", "norm", "norm_backward", "pick_weights", "turned", "turned_backward"]

_BLOCK = 1024
# Programs of a backward pass, each of which sums the gradient of a norm's weight over its tokens.
_PROGRAMS = 512


def norm(x_NH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the root-mean-square norm of rows in fp32, and return it in `dtype`, with the factors [N] of rows."""
    rows, width = x_NH.shape
    normed, scale = torch.empty_like(x_NH, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x_NH.device)
    wide = triton.next_power_of_2(width)
    _norm[(rows,)](x_NH, weight_H, normed, scale, epsilon, width, WIDE=wide, num_warps=_warps(wide))
    return normed, scale


@triton.jit
def _norm(x, weight, normed, scale, epsilon, width, WIDE: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside = place < width
    own = tl.load(x + row * width + place, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    # Rounded to the dtype of the input before the weight is applied, as the plain norm does.
    scaled = (wide * factor).to(own.dtype).to(tl.float32)
    weights = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + place, (scaled * weights).to(normed.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor)


def norm_backward(upstream_NH: Tensor, x_NH: Tensor, weight_H: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the rows and of the weight."""
    rows, width = x_NH.shape
    to_x, programs = torch.empty_like(x_NH), min(rows, _PROGRAMS)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x_NH.device)
    wide = triton.next_power_of_2(width)
    _norm_backward[(programs,)](
        upstream_NH, x_NH, weight_H, scale_N, to_x, sums, rows, width, WIDE=wide, num_warps=_warps(wide)
    )
    return to_x, sums.sum(0).to(weight_H.dtype)


@triton.jit
def _norm_backward(upstream, x, weight, scale, to_x, sums, rows, width, WIDE: tl.constexpr):
    place = tl.arange(0, WIDE)
    inside = place < width
    weights = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDE], dtype=tl.float32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for number in range(tl.cdiv(rows - tl.program_id(0), step)):
        row = first + number * step
        start = row * width
        factor = tl.load(scale + row)
        normed = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32) * factor
        given = tl.load(upstream + start + place, mask=inside, other=0.0).to(tl.float32)
        total += given * normed
        inner = given * weights
        inner = (inner - normed * (tl.sum(inner * normed, 0) / width)) * factor
        tl.store(to_x + start + place, inner.to(to_x.dtype.element_ty), mask=inside)
    tl.store(sums + first * width + place, total, mask=inside)


def turned(
    qk_NAD: Tensor, heads: int, turn: tuple[Tensor, Tensor], norms: Sequence[Tensor], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Norm and rotate queries and keys.

    Args:
        qk_NAD: [N, A, D] queries of some heads, then keys of the groups; contiguous.
        heads: how many of the A are queries.
        turn: cosines and signed sines [N, 1, D], as `models.llama.rotation` makes them.
        norms: weights [D] of the norms of queries and keys; empty where a model has no such norms.
        epsilon: of the norms.

    Returns:
        The same shape, and the factors [N, A] of the norms, empty where there are none.
    """
    (rows, both, size), (cos, sin) = qk_NAD.shape, turn
    out = torch.empty_like(qk_NAD)
    scale = torch.empty(rows, both if norms else 0, dtype=torch.float32, device=qk_NAD.device)
    q_norm, k_norm = norms or (cos, cos)
    _turned[(rows,)](
        qk_NAD, cos, sin, q_norm, k_norm, out, scale, epsilon, HEADS=heads, BOTH=both, SIZE=size,
        NORMS=bool(norms), **_tile(both, size),
    )  # fmt: skip
    return out, scale


@triton.jit
def _turned(
    qk, cos, sin, q_norm, k_norm, out, scale, epsilon,
    HEADS: tl.constexpr, BOTH: tl.constexpr, SIZE: tl.constexpr, NORMS: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, TALL)[:, None], tl.arange(0, WIDE)[None, :]
    partner = tl.where(place < SIZE // 2, place + SIZE // 2, place - SIZE // 2)
    inside, real = (head < BOTH) & (place < SIZE), place < SIZE
    start = row * BOTH * SIZE + head * SIZE
    mine = tl.load(qk + start + place, mask=inside, other=0.0)
    other = tl.load(qk + start + partner, mask=inside, other=0.0)
    if NORMS:
        kind = mine.dtype
        wide = mine.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + epsilon)
        tl.store(scale + row * BOTH + tl.arange(0, TALL), factor, mask=tl.arange(0, TALL) < BOTH)
        own_weight = pick_weights(q_norm, k_norm, head < HEADS, place, real)
        other_weight = pick_weights(q_norm, k_norm, head < HEADS, partner, real)
        mine = ((wide * factor[:, None]).to(kind).to(tl.float32) * own_weight).to(kind)
        other = ((other.to(tl.float32) * factor[:, None]).to(kind).to(tl.float32) * other_weight).to(kind)
    cosine = tl.load(cos + row * SIZE + place, mask=real, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * SIZE + place, mask=real, other=0.0).to(tl.float32)
    result = mine.to(tl.float32) * cosine + other.to(tl.float32) * sine
    tl.store(out + start + place, result.to(out.dtype.element_ty), mask=inside)


def turned_backward(
    upstream_NAD: Tensor, qk_NAD: Tensor, scale_NA: Tensor, heads: int, turn: tuple[Tensor, Tensor],
    norms: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradient of queries and keys, and those of the weights of both norms, [2, D] in fp32.

    The arguments are those of `turned`, with its factors. Queries and keys are read where there are norms.
    """
    (rows, both, size), (cos, sin) = upstream_NAD.shape, turn
    to_qk, programs = torch.empty_like(upstream_NAD), min(rows, _PROGRAMS)
    sums = torch.empty(programs if norms else 0, 2, size, dtype=torch.float32, device=cos.device)
    q_norm, k_norm = norms or (cos, cos)
    _turned_backward[(programs,)](
        upstream_NAD, qk_NAD, scale_NA, cos, sin, q_norm, k_norm, to_qk, sums, rows, HEADS=heads, BOTH=both, SIZE=size,
        NORMS=bool(norms), **_tile(both, size),
    )  # fmt: skip
    return to_qk, sums.sum(0)


@triton.jit
def _turned_backward(
    upstream, qk, scale, cos, sin, q_norm, k_norm, to_qk, sums, rows,
    HEADS: tl.constexpr, BOTH: tl.constexpr, SIZE: tl.constexpr, NORMS: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    head, place = tl.arange(0, TALL)[:, None], tl.arange(0, WIDE)[None, :]
    partner = tl.where(place < SIZE // 2, place + SIZE // 2, place - SIZE // 2)
    inside, real, is_query = (head < BOTH) & (place < SIZE), place < SIZE, head < HEADS
    to_queries, to_keys = tl.zeros([WIDE], dtype=tl.float32), tl.zeros([WIDE], dtype=tl.float32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for number in range(tl.cdiv(rows - tl.program_id(0), step)):
        row = first + number * step
        start, turning = row * BOTH * SIZE + head * SIZE, row * SIZE
        mine = tl.load(upstream + start + place, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(upstream + start + partner, mask=inside, other=0.0).to(tl.float32)
        cosine = tl.load(cos + turning + place, mask=real, other=0.0).to(tl.float32)
        # The partner's sine, for the partner took this number by its own.
        sine = tl.load(sin + turning + partner, mask=real, other=0.0).to(tl.float32)
        given = mine * cosine + other * sine
        if NORMS:
            column = tl.arange(0, TALL)
            factor = tl.load(scale + row * BOTH + column, mask=column < BOTH, other=0.0)[:, None]
            normed = tl.load(qk + start + place, mask=inside, other=0.0).to(tl.float32) * factor
            each = given * normed
            to_queries += tl.sum(tl.where(is_query, each, 0.0), 0)
            to_keys += tl.sum(tl.where(is_query, 0.0, each), 0)
            inner = given * pick_weights(q_norm, k_norm, is_query, place, real)
            given = (inner - normed * (tl.sum(inner * normed, 1) / SIZE)[:, None]) * factor
        tl.store(to_qk + start + place, given.to(to_qk.dtype.element_ty), mask=inside)
    if NORMS:
        own = sums + first * 2 * SIZE + tl.arange(0, WIDE)
        tl.store(own, to_queries, mask=tl.arange(0, WIDE) < SIZE)
        tl.store(own + SIZE, to_keys, mask=tl.arange(0, WIDE) < SIZE)


@triton.jit
def pick_weights(q_norm, k_norm, is_query, place, real):
    """Read the weights of one of two norms: a pointer cannot depend on a value that a kernel computes."""
    of_query = tl.load(q_norm + place, mask=real, other=0.0).to(tl.float32)
    of_key = tl.load(k_norm + place, mask=real, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)


def gated_silu(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """Compute silu(gate) x up. Rows may be parts of longer ones."""
    rows, width = gate_NI.shape
    inner = torch.empty(rows, width, dtype=gate_NI.dtype, device=gate_NI.device)
    _gated_silu[(rows, triton.cdiv(width, _BLOCK))](
        gate_NI, up_NI, inner, gate_NI.stride(0), up_NI.stride(0), width, BLOCK=_BLOCK
    )  # fmt: skip
    return inner


@triton.jit
def _gated_silu(gate, up, inner, gate_row, up_row, width, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    own = tl.load(gate + row * gate_row + place, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    # Rounded between the two factors, as the plain activation is.
    activated = (wide / (1.0 + tl.exp(-wide))).to(own.dtype).to(tl.float32)
    factor = tl.load(up + row * up_row + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(inner + row * width + place, (activated * factor).to(inner.dtype.element_ty), mask=inside)


def gated_silu_backward(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up."""
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    _gated_silu_backward[(triton.cdiv(gate.numel(), _BLOCK),)](
        upstream, gate, up, to_gate, to_up, gate.numel(), BLOCK=_BLOCK
    )
    return to_gate, to_up


@triton.jit
def _gated_silu_backward(upstream, gate, up, to_gate, to_up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    given = tl.load(upstream + place, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    open_share = 1.0 / (1.0 + tl.exp(-wide))
    slope = open_share * (1.0 + wide * (1.0 - open_share))
    tl.store(to_gate + place, (given * factor * slope).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + place, (given * wide * open_share).to(to_up.dtype.element_ty), mask=inside)


def _tile(both: int, size: int) -> dict[str, int]:
    tall, wide = triton.next_power_of_2(both), triton.next_power_of_2(size)
    return {"TALL": tall, "WIDE": wide, "num_warps": _warps(tall * wide)}


def _warps(numbers: int) -> int:
    """Choose the warps of a program, so that a thread holds some 16 numbers."""
    return min(16, max(1, triton.next_power_of_2(numbers // 512)))
