"""Compute the parts of one decoded token, each a function of tensors that a fused kernel may replace.

Shapes are static: the present column of the cache is a tensor on the device, and masked columns are computed along. So
a captured graph of these parts can be replayed at the next column. `FusedDecoder` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_opd.functional import sample_tokens
from lit_opd.models.llama import Turn, rms_norm

__all__ = ["PLAIN", "Column", "Seen", "TokenParts", "attend_cached", "forbid", "gated", "turn_and_write"]

Column = Tensor | int
"""A column of the cache: [1] on the device, or where nothing is captured a number, which a CPU writes at faster."""


@dataclass(frozen=True)
class Seen:
    """The columns that each row may look at, `first_B` to `column`.

    Attributes:
        first_B: where the prompt of each row begins.
        column: the present column, the same for all rows.
        bias_BM: 0 at these columns, minus infinity elsewhere.
    """

    first_B: Tensor
    column: Column
    bias_BM: Tensor


def turn_and_write(
    qk_BND: Tensor, value_BGD: Tensor, own: Any, turn: Turn, cache: Tensor, column: Column, norm: Callable[..., Tensor]
) -> Tensor:
    """Norm and rotate queries and keys, and write keys and values at the present column.

    Args:
        qk_BND: [B, H + G, D] queries, then keys.
        value_BGD: values.
        own: the attention's module, for the norms of queries and keys, where it has them.
        turn: cosine and signed sine [B, 1, D].
        cache: [2, B, G, M, D] keys and values, written in place.
        column: where.
        norm: as `rms_norm`.

    Returns:
        [B, H, D] queries.
    """
    dtype, groups = qk_BND.dtype, value_BGD.shape[1]
    heads = qk_BND.shape[1] - groups
    if hasattr(own, "q_norm"):
        normed = norm(qk_BND[:, :heads], own.q_norm, dtype), norm(qk_BND[:, heads:], own.k_norm, dtype)
        qk_BND = torch.cat(normed, dim=1)
    cos, sin = turn
    wide = qk_BND.to(cos.dtype)
    qk_BND = torch.addcmul(wide * cos, wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin).to(dtype)
    for kept, new in zip(cache, (qk_BND[:, heads:], value_BGD), strict=True):
        if isinstance(column, int):
            kept[:, :, column] = new
        else:
            kept.index_copy_(2, column, new[:, :, None])
    return qk_BND[:, :heads]


def attend_cached(query_BHD: Tensor, cache: Tensor, seen: Seen, scale: float) -> Tensor:
    """Attend to the cache [2, B, G, M, D], and return [B, G, H / G, D]."""
    keys, values = cache
    # A group's queries take the place of positions, so that the kernel reads its keys once for them all.
    grouped = query_BHD.view(len(query_BHD), keys.shape[1], -1, keys.shape[-1])
    return scaled_dot_product_attention(grouped, keys, values, seen.bias_BM[:, None, None], scale=scale)


def gated(gate_BI: Tensor, up_BI: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply one half of an MLP by the activation of the other."""
    return activation(gate_BI) * up_BI


def forbid(logits_BV: Tensor, ids_F: Tensor, early_1: Tensor) -> Tensor:
    """Put minus infinity at some tokens, in place, where a condition on the device holds."""
    return logits_BV.index_copy_(1, ids_F, logits_BV.index_select(1, ids_F).masked_fill(early_1, -torch.inf))


@dataclass(frozen=True)
class TokenParts:
    """The functions that decode a token, in torch if not given.

    Attributes:
        norm: as `rms_norm`.
        write: as `turn_and_write`.
        attend: as `attend_cached`.
        gate: as `gated`.
        draw: as `sample_tokens`, without forbidden ids.
    """

    norm: Callable[..., Tensor] = rms_norm
    write: Callable[..., Tensor] = turn_and_write
    attend: Callable[..., Tensor] = attend_cached
    gate: Callable[..., Tensor] = gated
    draw: Callable[..., tuple[Tensor, Tensor]] = sample_tokens


PLAIN = TokenParts()
