"""Compute attention over a packed layout with PyTorch's flash attention, which needs neither mask nor padding.

The kernels are those below `torch.nn.attention.varlen`, on CUDA and in half precision. They are called directly, for
that module (new in torch 2.10, with other arguments in each release since) drops the gradient of the log-sum-exp.
Where a chain has fewer queries than keys, their causal mask is aligned to the bottom right corner (flash-attn 2.1 and
later, `flash_attn_varlen_func`). `attend` in `packed_attention` is the reference, and `flash_proof` compares the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_opd.functional.precision import upcast
from lit_opd.models.flash_pieces import Piece, pieces_of
from lit_opd.models.packed_attention import attend
from lit_opd.models.packing import Layout

__all__ = ["DTYPES", "attend_flash"]

DTYPES = (torch.float16, torch.bfloat16)


def attend_flash(
    query_NHD: Tensor,
    key_NGD: Tensor,
    value_NGD: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
    dropped: float = 0.0,
) -> Tensor:
    """Attend like `attend`, whose arguments and result these are, with values as wide as keys.

    Dropout, and numbers in another precision, are beyond the kernel and left to `attend`.
    """
    if dropped or query_NHD.dtype not in DTYPES:
        return attend(query_NHD, key_NGD, value_NGD, layout, scale, window, dropped)
    return _FlashAttention.apply(query_NHD, key_NGD, value_NGD, pieces_of(layout, window), scale)


class _FlashAttention(torch.autograd.Function):
    """Attention in pieces, whose softmax runs over the keys of all pieces.

    Each call gives an output and the log-sum-exp of its scores, which weighs the output against those of other calls.
    In the backward pass each call gets the output and the log-sum-exp of all, and gives its share of the gradient.
    Ring attention (arXiv:2310.01889) splits keys in the same way.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: tuple[Piece, ...], scale: float) -> Tensor:
        first, *others = pieces
        out, lse_HN = _run(query, key, value, first, scale)
        for piece in others:
            _merge(out, lse_HN, piece, *_run(query, key, value, piece, scale))
        ctx.save_for_backward(query, key, value, out, lse_HN)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse_HN = ctx.saved_tensors
        sums: list[Tensor | None] = [None, None, None]
        for piece in ctx.pieces:
            parts = _run_back(upstream, query, key, value, out, lse_HN, piece, ctx.scale)
            indices = piece.queries_Q, piece.keys_K, piece.keys_K
            found = zip(sums, parts, indices, strict=True)
            sums = [_plus(total, part, index, len(query)) for total, part, index in found]
        to_query, to_key, to_value = (None if total is None else total.to(query.dtype) for total in sums)
        return to_query, to_key, to_value, None, None


def _run(query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    """Call the kernel on a piece and return its output [Q, H, D] and log-sum-exp [H, Q]."""
    inputs = _chosen(query, piece.queries_Q), _chosen(key, piece.keys_K), _chosen(value, piece.keys_K)
    call = torch.ops.aten._flash_attention_forward
    out, lse_HQ, *_ = call(*inputs, *_extent(piece), 0.0, piece.causal, False, scale=scale, **_limit(piece))
    return out, lse_HQ


def _run_back(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse_HN: Tensor, piece: Piece, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the kernel's backward pass on a piece and return the gradients of the queries and keys that it used."""
    own, seen = piece.queries_Q, piece.keys_K
    inputs = (_chosen(x, index) for x, index in ((upstream, own), (query, own), (key, seen), (value, seen), (out, own)))
    lse_HQ = lse_HN if own is None else lse_HN[:, own]
    # The state of the random numbers, which dropout alone would read.
    unused = (torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device))
    call = torch.ops.aten._flash_attention_backward
    return call(*inputs, lse_HQ, *_extent(piece), 0.0, piece.causal, *unused, scale=scale, **_limit(piece))


def _chosen(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _extent(piece: Piece) -> tuple[Tensor, Tensor, int, int]:
    # At one query a chain, flash-attn puts the heads of a group in the place of queries, and its log-sum-exp comes in
    # another order. A larger bound is as right and keeps it from that.
    return piece.ends_q, piece.ends_k, max(piece.longest_q, 2), piece.longest_k


def _limit(piece: Piece) -> dict[str, int]:
    return {} if piece.window is None else {"window_size_left": piece.window - 1, "window_size_right": 0}


def _merge(out: Tensor, lse_HN: Tensor, piece: Piece, more: Tensor, more_lse_HQ: Tensor) -> None:
    """Put what a piece adds into the output [N, H, D] and the log-sum-exp [H, N] of the pieces before it."""
    index = piece.queries_Q
    before_HQ = lse_HN[:, index]
    share_QH1 = torch.sigmoid(more_lse_HQ - before_HQ).T[:, :, None]
    out[index] = torch.lerp(upcast(out[index]), upcast(more), share_QH1).to(out.dtype)
    lse_HN[:, index] = torch.logaddexp(before_HQ, more_lse_HQ)


def _plus(total: Tensor | None, part: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Add the gradient of chosen rows to that of all, in fp32 where there is more than one."""
    if index is None and total is None:
        return part
    wide = upcast(part)
    sums = wide.new_zeros(rows, *part.shape[1:]) if total is None else upcast(total)
    return sums + wide if index is None else sums.index_add_(0, index, wide)
