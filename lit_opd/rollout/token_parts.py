"""Compute the parts of one decoded token, each a function of tensors that a fused kernel may replace.

Shapes are static: the present column of the cache is a tensor on the device, and masked columns are computed along. So
a captured graph of these parts can be replayed at the next column. `FusedDecoder` and `Sheet` run them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_opd.functional import Head, sample_tokens
from lit_opd.functional.precision import upcast
from lit_opd.models.layer_parts import Turn, normed, rotated
from lit_opd.types import SamplingLaw

__all__ = ["PLAIN", "Bar", "Column", "Norms", "Seen", "TokenParts"]

Column = Tensor | int
"""A column of the cache: [1] on the device, or where nothing is captured a number, which a CPU writes at faster."""
Norms = tuple[Tensor, Tensor, float]
"""Weights [D] of the norms of queries and keys, and their epsilon."""
Bar = tuple[Tensor, Tensor]
"""Tokens [F] that may not be drawn while a condition [1] on the device holds."""


@dataclass(frozen=True)
class Seen:
    """The columns that each row may look at, `first_B` to `column`, and of these the last `window`.

    Attributes:
        first_B: where the prompt of each row begins.
        column: the present column, the same for all rows.
        bias_BM: 0 at these columns, minus infinity elsewhere.
        window: how many columns, the present one included, None for all.
    """

    first_B: Tensor
    column: Column
    bias_BM: Tensor
    window: int | None = None

    def within(self, window: int | None) -> Seen:
        """Look at the last columns alone, with a bias that is made anew from the present column."""
        width = self.bias_BM.shape[1]
        if window is None or window >= width:
            return self
        columns_M = torch.arange(width, device=self.bias_BM.device)
        bias_BM = self.bias_BM.masked_fill(columns_M <= self.column - window, -torch.inf)
        return replace(self, bias_BM=bias_BM, window=window)


def norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Compute the root-mean-square norm of the last dimension in fp32 (float64 stays), and return it in `dtype`."""
    return normed(x, weight, epsilon, dtype)[0]


def rotate_and_store(
    qk_BND: Tensor, value_BGD: Tensor, turn: Turn, cache: Tensor, column: Column, norms: Norms | None
) -> Tensor:
    """Norm and rotate queries and keys, put keys and values into the cache, and return queries [B, H, D].

    Args:
        qk_BND: [B, H + G, D] queries, then keys.
        value_BGD: values.
        turn: cosine and signed sine [B, 1, D].
        cache: [2, B, G, M, D] keys and values, written in place.
        column: where.
        norms: where the model has them.
    """
    dtype, groups = qk_BND.dtype, value_BGD.shape[1]
    heads = qk_BND.shape[1] - groups
    if norms is not None:
        q_norm, k_norm, epsilon = norms
        parts = norm(qk_BND[:, :heads], q_norm, epsilon, dtype), norm(qk_BND[:, heads:], k_norm, epsilon, dtype)
        qk_BND = torch.cat(parts, dim=1)
    qk_BND = rotated(qk_BND, turn, dtype)
    for kept, new in zip(cache, (qk_BND[:, heads:], value_BGD), strict=True):
        if isinstance(column, int):
            kept[:, :, column] = new
        else:
            kept.index_copy_(2, column, new[:, :, None])
    return qk_BND[:, :heads]


def attend(query_BHD: Tensor, keys_BGMD: Tensor, values_BGMD: Tensor, seen: Seen, scale: float) -> Tensor:
    """Attend to the columns of the cache that each row may look at, and return [B, H, D]."""
    # A group's queries take the place of positions, so that the kernel reads its keys once for them all.
    grouped = query_BHD.view(len(query_BHD), keys_BGMD.shape[1], -1, keys_BGMD.shape[-1])
    bias_B11M = seen.bias_BM[:, None, None]
    mixed = scaled_dot_product_attention(grouped, keys_BGMD, values_BGMD, bias_B11M, scale=scale)
    return mixed.reshape(query_BHD.shape)


def gate(gate_BI: Tensor, up_BI: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply one half of an MLP by the activation of the other."""
    return activation(gate_BI) * up_BI


def draw(linear_BV: Tensor, head: Head, law: SamplingLaw, uniforms_B: Tensor, bar: Bar | None) -> tuple[Tensor, Tensor]:
    """Draw tokens as `sample_tokens` does, from the linear part of the logits, which may be overwritten."""
    logits_BV = head.shape_logits(upcast(linear_BV))
    if bar is not None:
        forbid(logits_BV, *bar)
    return sample_tokens(logits_BV, law, uniforms_B)


def forbid(logits_BV: Tensor, ids_F: Tensor, early_1: Tensor) -> None:
    """Put minus infinity at some tokens, in place, where a condition on the device holds."""
    logits_BV.index_copy_(1, ids_F, logits_BV.index_select(1, ids_F).masked_fill(early_1, -torch.inf))


@dataclass(frozen=True)
class TokenParts:
    """The functions that decode a token, by default those of this file, which run everywhere.

    Others take and return the same, but for `column`, which is always on the device for them.
    """

    norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor] = norm
    rotate_and_store: Callable[[Tensor, Tensor, Turn, Tensor, Column, Norms | None], Tensor] = rotate_and_store
    attend: Callable[[Tensor, Tensor, Tensor, Seen, float], Tensor] = attend
    gate: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] = gate
    draw: Callable[[Tensor, Head, SamplingLaw, Tensor, Bar | None], tuple[Tensor, Tensor]] = draw


PLAIN = TokenParts()
