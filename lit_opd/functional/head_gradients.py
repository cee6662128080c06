"""Sum the gradients of a head's inputs over chunks of positions, without a temporary as large as the head.

`functional.head` adds the gradient by each chunk's logits, and hands the sums to autograd at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast

__all__ = ["HeadGradients", "with_gradients"]

# Rows of a product that is added to a sum of another dtype, where no kernel does both at once.
_ROWS = 2**14


class HeadGradients:
    """Sums of the gradients by hidden states, weight and bias, None where one is not wanted.

    Those of the head are summed over chunks in fp32, for a sum in bf16 rounds away most of what each small chunk adds.

    Args:
        sources: hidden states [N, H], weight [V, H] and bias [V] or None, as the caller gave them.
    """

    def __init__(self, sources: Sequence[Tensor | None]) -> None:
        self._sources = sources
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in sources]
        widths = [
            None if x is None else x.dtype if place == 0 else upcast(x[:0]).dtype for place, x in enumerate(sources)
        ]
        self.hidden_NH, self.weight_VH, self.bias_V = (
            torch.zeros_like(x, dtype=width) if w and x is not None else None
            for x, w, width in zip(sources, wanted, widths, strict=True)
        )
        self.wanted = any(wanted)

    def add(self, grad_cV: Tensor, hidden_cH: Tensor, weight_VH: Tensor, part: slice, slabs: Iterable[slice]) -> None:
        """Add what a chunk's gradient by the logits gives, a slab of the vocabulary at a time.

        `hidden_cH` has the dtype of `grad_cV`, and `part` says which positions these are.
        """
        to_hidden_cH = upcast(hidden_cH[:0]).new_zeros(hidden_cH.shape)
        for slab in slabs:
            if self.hidden_NH is not None:
                add_product(to_hidden_cH, grad_cV[:, slab], weight_VH[slab].to(grad_cV.dtype))
            if self.weight_VH is not None and self.weight_VH.dtype == grad_cV.dtype:
                self.weight_VH[slab].addmm_(grad_cV[:, slab].T, hidden_cH)  # makes no product as large as the slab
            elif self.weight_VH is not None:
                add_product(self.weight_VH[slab], grad_cV[:, slab].T, hidden_cH)
        if self.hidden_NH is not None:
            self.hidden_NH[part] = to_hidden_cH.to(self.hidden_NH.dtype)
        if self.bias_V is not None:
            self.bias_V += grad_cV.sum(0)

    def narrowed(self) -> list[Tensor | None]:
        """Give the sums in the dtypes of their sources."""
        sums = (self.hidden_NH, self.weight_VH, self.bias_V)
        return [g if g is None or x is None else g.to(x.dtype) for g, x in zip(sums, self._sources, strict=True)]


def add_product(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Add a matrix product to a sum in place, where the device can without rounding it to the factors' dtype before."""
    if sum_MN.dtype == torch.float32 and adds_wide(left_MK.device, left_MK.dtype):
        _add_wide(sum_MN, left_MK, right_KN)
        return
    for start in range(0, len(sum_MN), _ROWS):
        rows = slice(start, start + _ROWS)
        sum_MN[rows] += left_MK[rows] @ right_KN


@cache
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether products of a dtype of 16 bits are added to fp32 sums in one kernel.

    cuBLAS does; releases of torch that refuse a sum of another dtype than the factors are found by trying.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    small = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        _add_wide(small.float(), small, small)
    except (AttributeError, RuntimeError):
        return False
    return True


def _add_wide(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    # Not `torch.addmm`, which failed where `out` and `out_dtype` were given together (pytorch issue 154086).
    torch.ops.aten.addmm.dtype_out(sum_MN, left_MK, right_KN, torch.float32, out=sum_MN)


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known before the backward pass."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *sources: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return None, None, *scaled


def with_gradients(total: Tensor, gradients: list[Tensor | None], sources: Sequence[Tensor | None]) -> Tensor:
    """Make a scalar that hands known gradients to its sources in the backward pass."""
    return _WithGradients.apply(total, gradients, *sources)
