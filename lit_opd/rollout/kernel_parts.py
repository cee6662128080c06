"""Compute the parts of one decoded token by kernels, each in one pass.

They do what `token_parts` does in many small operations, in fp32 inside. `LocalEngine` takes them for captured steps
where they prove themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lit_opd.functional import Head
from lit_opd.models.layer_parts import Turn, is_silu
from lit_opd.rollout import token_parts
from lit_opd.rollout.token_parts import Bar, Column, Norms, Seen, TokenParts
from lit_opd.types import SamplingLaw

__all__ = ["by_kernels", "why_not_kernels"]


def why_not_kernels(dtype: torch.dtype) -> str | None:
    """Say why kernels cannot compute a token in this dtype, None where they can."""
    return "kernels compute in float32" if dtype == torch.float64 else None


@cache
def by_kernels() -> TokenParts:
    """Make the parts that run on an accelerator, or interpreted on a CPU, always the same, by which graphs are kept."""
    return TokenParts(_norm, _rotate_and_store, _attend, _gate, _draw)


def _norm(x_BH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    from lit_opd.kernels.layer import norm

    return norm(x_BH, weight_H, epsilon, dtype)[0]


def _rotate_and_store(
    qk_BND: Tensor, value_BGD: Tensor, turn: Turn, cache: Tensor, column: Column, norms: Norms | None
) -> Tensor:
    from lit_opd.kernels.decode_layer import rotate_and_store

    assert isinstance(column, Tensor)
    return rotate_and_store(qk_BND, value_BGD, turn, cache, column, norms)


def _attend(query_BHD: Tensor, keys_BGMD: Tensor, values_BGMD: Tensor, seen: Seen, scale: float) -> Tensor:
    from lit_opd.kernels.decode_attention import decode_attention

    assert isinstance(seen.column, Tensor)
    return decode_attention(query_BHD, keys_BGMD, values_BGMD, seen.first_B, seen.column, scale, seen.window)


def _gate(gate_BI: Tensor, up_BI: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    from lit_opd.kernels.layer import gated_silu

    if is_silu(activation):
        return gated_silu(gate_BI, up_BI)
    return token_parts.gate(gate_BI, up_BI, activation)


def _draw(
    linear_BV: Tensor, head: Head, law: SamplingLaw, uniforms_B: Tensor, bar: Bar | None
) -> tuple[Tensor, Tensor]:
    from lit_opd.kernels.token_draw import draw_tokens

    if law.temperature == 0 or law.truncates:
        return token_parts.draw(linear_BV, head, law, uniforms_B, bar)
    if bar is not None:
        token_parts.forbid(linear_BV, *bar)
    return draw_tokens(linear_BV, uniforms_B, 1 / (head.temperature * law.temperature), head.softcap, head.scale)
