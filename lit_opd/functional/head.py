"""The vocabulary head, a chunk of positions at a time, with its gradient formed in the forward pass.

No tensor of all positions by the whole vocabulary ever exists: a chunk of logits is made, its loss differentiated at
once with respect to these logits, and only the gradients of the hidden states and of the head are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_opd.functional.precision import upcast

__all__ = ["Head", "chunk_rows", "chunks", "compute_dtype", "head_logits", "position_losses"]

Stats = dict[str, Tensor]
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Stats]]

# Live fp32 copies of a chunk of logits at the peak: the two models' logits, log-probabilities, gradient, temporaries.
_COPIES = 8


@dataclass(frozen=True)
class Head:
    """The last layer of a language model.

    Attributes:
        weight_VH: [V, H] projection.
        bias_V: [V] or None.
        scale: factor on the logits (Cohere; 1 / logits_scaling in Granite).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma), or None.
        temperature: divides the logits at the very end; another value than 1 gives another distribution.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def to(self, dtype: torch.dtype) -> Head:
        """The same head with its tensors in `dtype`."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return replace(self, weight_VH=self.weight_VH.to(dtype), bias_V=bias_V)

    def shape_logits(self, linear_NV: Tensor) -> Tensor:
        """What becomes of the projection: scale, then soft-cap, then temperature; [N, V] to [N, V]."""
        logits = linear_NV if self.scale == 1 else linear_NV * self.scale
        capped = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return capped if self.temperature == 1 else capped / self.temperature


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def head_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    """Logits of the given positions.

    Args:
        hidden_NH: [N, H] last hidden states.
        head: the head; its projection runs in the compute dtype, everything after it in fp32.

    Returns:
        [N, V] unnormalised, fp32 (float64 stays).
    """
    dtype = compute_dtype(hidden_NH)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return head.shape_logits(upcast(linear(hidden_NH.to(dtype), head.weight_VH.to(dtype), bias)))


def chunk_rows(vocabulary: int, budget_mib: int) -> int:
    """Positions a chunk may hold so that its working memory stays within `budget_mib` MiB; at least 1."""
    return max(1, budget_mib * 2**20 // (_COPIES * 4 * vocabulary))


def chunks(positions: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` positions that cover all of them in order."""
    for start in range(0, positions, rows):
        yield slice(start, min(start + rows, positions))


def position_losses(hidden_NH: Tensor, head: Head, chunk_loss: ChunkLoss, rows: int) -> tuple[Tensor, Stats]:
    """Sum of a loss over positions, with its gradient formed a chunk at a time.

    Args:
        hidden_NH: [N, H] student hidden states of the counted positions.
        head: the student's head.
        chunk_loss: maps ([c, V] fp32 logits, the slice of positions they belong to) to the chunk's summed loss and a
            dictionary of detached per-position values [c].
        rows: positions a chunk.

    Returns:
        The scalar loss, differentiable with respect to `hidden_NH` and the head, and the per-position values
        concatenated to [N]. With gradients off, only values are computed.
    """
    dtype = compute_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        total, gradients, stats = _run_chunks(hidden_NH, head, chunk_loss, rows, dtype)
    if torch.is_grad_enabled():
        total = _WithGradients.apply(total, gradients, hidden_NH, head.weight_VH, head.bias_V)
    return total, stats


def _run_chunks(
    hidden_NH: Tensor, head: Head, chunk_loss: ChunkLoss, rows: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], Stats]:
    hidden, weight = hidden_NH.detach().to(dtype), head.weight_VH.detach().to(dtype)
    bias = None if head.bias_V is None else head.bias_V.detach().to(dtype)
    wanted = torch.is_grad_enabled()
    sources = (hidden_NH, head.weight_VH, head.bias_V)
    gradients = [torch.zeros_like(x) if wanted and x is not None and x.requires_grad else None for x in sources]
    total = torch.zeros((), dtype=upcast(hidden[:0]).dtype, device=hidden.device)
    collected: dict[str, list[Tensor]] = {}
    # One empty chunk where nothing is counted, so that the per-position values exist with length zero.
    for part in list(chunks(len(hidden), rows)) or [slice(0, 0)]:
        projected = upcast(linear(hidden[part], weight, bias)).requires_grad_(wanted)
        loss, stats = chunk_loss(head.shape_logits(projected), part)
        total += loss.detach()
        for name, value in stats.items():
            collected.setdefault(name, []).append(value.detach())
        if wanted and loss.requires_grad:
            (grad_cV,) = torch.autograd.grad(loss, projected)
            _accumulate(gradients, grad_cV.to(dtype), hidden[part], weight, part)
    return total, gradients, {name: torch.cat(values) for name, values in collected.items()}


def _accumulate(
    gradients: list[Tensor | None], grad_cV: Tensor, hidden_cH: Tensor, weight: Tensor, part: slice
) -> None:
    grad_hidden, grad_weight, grad_bias = gradients
    if grad_hidden is not None:
        grad_hidden[part] = (grad_cV @ weight).to(grad_hidden.dtype)
    if grad_weight is not None:
        grad_weight += grad_cV.T @ hidden_cH
    if grad_bias is not None:
        grad_bias += grad_cV.sum(0)


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are already known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *sources: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return None, None, *scaled
