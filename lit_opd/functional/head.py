"""Project on the vocabulary a chunk of positions at a time, and form the gradient in the forward pass.

No tensor of all positions by the whole vocabulary ever exists: a chunk of logits is made, its loss differentiated at
once with respect to these logits, and only the gradients of the hidden states and of the head are kept. The objective
runs every estimator in here, scorers and yardsticks read log-probabilities with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_opd.functional.head_gradients import HeadGradients, with_gradients
from lit_opd.functional.precision import log_softmax, upcast

Stats = dict[str, Tensor]
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Stats]]
Piece = tuple[slice, Tensor, Stats]
Differentiate = Callable[[Tensor, slice, bool], Iterator[Piece]]

# Live fp32 copies of a block of logits at the peak: the two models' logits, log-probabilities, gradient, temporaries.
_COPIES = 8
# A block of logits on a CPU, which stays in a core's cache while some thirty elementwise passes go over it. An
# accelerator has the bandwidth for whole chunks, and is faster with few and large kernels.
_CPU_BLOCK_BYTES = 3 * 2**20
# Tokens of the vocabulary whose weights are cast and multiplied at once on a CPU: for all of them, the low-precision
# copy, its layout for oneDNN's kernel and the gradient's product would each take half of the head's memory again.
_CPU_SLAB = 4096
# Working memory of a chunk by `auto`, in MiB: on a CPU, and the most on an accelerator, a 16th of whose free memory it
# gets. An accelerator reads and writes the gradient of the head once a chunk, and is faster with few chunks.
_CPU_MIB, _MOST_MIB, _SHARE = 256, 4096, 16
# The same under deterministic algorithms.
_FIXED_MIB = 1024


@dataclass(frozen=True)
class Head:
    """The last layer of a language model.

    Attributes:
        weight_VH: projection.
        bias_V: added to it, or None.
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
        """Cast the tensors of the head to `dtype`."""
        return self._map(lambda x: x.to(dtype))

    def detach(self) -> Head:
        """Cut the head off its autograd graph."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Head:
        bias_V = None if self.bias_V is None else change(self.bias_V)
        return replace(self, weight_VH=change(self.weight_VH), bias_V=bias_V)

    def shape_logits(self, linear_NV: Tensor) -> Tensor:
        """Scale, soft-cap and temper a projection, [N, V] to [N, V]."""
        logits = linear_NV if self.scale == 1 else linear_NV * self.scale
        capped = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return capped if self.temperature == 1 else capped / self.temperature


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Tell the dtype that matrix products run in: autocast's where it is on, else that of the hidden states.

    >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.bfloat16
    """
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def head_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    """Project hidden states on the vocabulary: [N, V] unnormalised, in the compute dtype and after that in fp32.

    >>> head = Head(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), temperature=0.5)
    >>> head_logits(torch.tensor([[3.0, 1.0]]), head)
    tensor([[6., 4.]])
    """
    return head.shape_logits(upcast(_project(hidden_NH, head)))


def _project(hidden_NH: Tensor, head: Head) -> Tensor:
    """Compute the linear part of the logits, in the compute dtype."""
    dtype, (vocabulary, _) = compute_dtype(hidden_NH), head.weight_VH.shape
    low_NH, slabs = hidden_NH.to(dtype), list(_slabs(vocabulary, hidden_NH.device))
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if len(slabs) == 1:
            return _project_slab(low_NH, head, slabs[0])
        logits_NV = low_NH.new_empty(len(low_NH), vocabulary)
        for slab in slabs:
            logits_NV[:, slab] = _project_slab(low_NH, head, slab)
        return logits_NV


def _slabs(vocabulary: int, device: torch.device) -> Iterator[slice]:
    return chunks(vocabulary, _CPU_SLAB if device.type == "cpu" else vocabulary)


def _project_slab(low_NH: Tensor, head: Head, slab: slice) -> Tensor:
    bias_V = None if head.bias_V is None else head.bias_V[slab].to(low_NH.dtype)
    return linear(low_NH, head.weight_VH[slab].to(low_NH.dtype), bias_V)


def block_rows(vocabulary: int, device: torch.device) -> int | None:
    """Tell how many positions' fp32 logits are worked on at once, None for the whole chunk.

    >>> block_rows(vocabulary=2**17, device=torch.device("cpu"))
    6
    """
    return max(1, _CPU_BLOCK_BYTES // (4 * vocabulary)) if device.type == "cpu" else None


def chunk_rows(vocabulary: int, budget_mib: int | str, device: torch.device) -> int:
    """Tell how many positions to project at once within a working memory of `budget_mib` MiB (or `auto`), at least 1.

    It holds both models' logits in fp32, whose place the gradient takes, and the copies of a block of them.

    >>> chunk_rows(vocabulary=2**17, budget_mib=256, device=torch.device("cpu"))
    232
    """
    budget, row_bytes = _budget(budget_mib, device) * 2**20, 4 * vocabulary
    block = block_rows(vocabulary, device)
    if block is None:
        return max(1, budget // ((2 + _COPIES) * row_bytes))
    return max(1, (budget - _COPIES * block * row_bytes) // (2 * row_bytes))


def _budget(chosen_mib: int | str, device: torch.device) -> int:
    """Tell the working memory of a chunk in MiB: the chosen one, or by `auto` what suits the device."""
    if chosen_mib != "auto":
        return int(chosen_mib)
    if device.type != "cuda":
        return _CPU_MIB
    if torch.are_deterministic_algorithms_enabled():  # free memory may differ when a run is resumed
        return _FIXED_MIB
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_CPU_MIB, min(_MOST_MIB, (free + unused) // (_SHARE * 2**20)))


def chunks(positions: int, rows: int) -> Iterator[slice]:
    """Cut positions into slices of at most `rows`, in order.

    >>> list(chunks(5, rows=2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for start in range(0, positions, rows):
        yield slice(start, min(start + rows, positions))


class HiddenDistributions:
    """The distributions of a frozen model at N positions, kept as its last hidden states together with their head.

    Logits are projected `rows` positions at a time, so that one product reads the head once for all, and handed out a
    few at a time. No gradient reaches the model.
    """

    def __init__(self, hidden_NH: Tensor, head: Head, rows: int) -> None:
        self.hidden_NH, self.head, self.rows = hidden_NH.detach(), head.detach(), rows
        self._start, self._projected_cV = -1, hidden_NH[:0]

    def __len__(self) -> int:
        return len(self.hidden_NH)

    def __getitem__(self, index: Tensor | slice) -> HiddenDistributions:
        """Choose positions."""
        return HiddenDistributions(self.hidden_NH[index], self.head, self.rows)

    def project(self, part: slice) -> Tensor:
        """Make the projection [c, V] of a slice of positions as the product gives it, before the head shapes it."""
        return _project(self.hidden_NH[part], self.head)

    def logits(self, part: slice) -> Tensor:
        """Make logits [c, V] in fp32 (float64 stays), from memory where a slice lies within one projection."""
        start = part.start // self.rows * self.rows
        if part.stop > start + self.rows:
            return head_logits(self.hidden_NH[part], self.head)
        if start != self._start:
            self._projected_cV = _project(self.hidden_NH[start : start + self.rows], self.head)
            self._start = start
        logits = self.head.shape_logits(upcast(self._projected_cV[part.start - start : part.stop - start]))
        if part.stop >= len(self):  # free a projection, as large as a chunk, once it was read: scores live longer
            self._start, self._projected_cV = -1, self.hidden_NH[:0]
        return logits

    def logps(self, part: slice) -> Tensor:
        """Make log-probabilities [c, V], nats in fp32 (float64 stays), of a slice of positions."""
        return log_softmax(self.logits(part))


def position_losses(hidden_NH: Tensor, head: Head, chunk_loss: ChunkLoss, rows: int) -> tuple[Tensor, Stats]:
    """Sum a loss over positions, and form its gradient a chunk at a time.

    A chunk is projected at once, so that one product reads the head once for many rows. Within it the loss is
    differentiated a block at a time, because a small block stays in cache. The gradient takes the place of the logits.

    Args:
        hidden_NH: [N, H] student hidden states of the counted positions.
        head: the student's head.
        chunk_loss: maps ([c, V] fp32 logits, the slice of positions they belong to) to the summed loss of these and a
            dictionary of detached per-position values, of leading shape [c].
        rows: positions a chunk.

    Returns:
        The scalar loss, differentiable with respect to `hidden_NH` and the head, and the per-position values
        concatenated to [N]. With gradients off, only values are computed.

    >>> head, hidden_NH = Head(torch.eye(2)), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> def first(logits_cV, part):
    ...     return logits_cV[:, 0].sum(), {"first": logits_cV[:, 0]}
    >>> loss, stats = position_losses(hidden_NH, head, first, rows=1)
    >>> loss.backward()
    >>> loss.item(), stats["first"], hidden_NH.grad
    (4.0, tensor([1., 3.]), tensor([[1., 0.],
            [1., 0.]]))
    """
    return run_head(hidden_NH, head, _by_autograd(head, chunk_loss), rows)


@torch.profiler.record_function("head")
def run_head(hidden_NH: Tensor, head: Head, differentiate: Differentiate, rows: int) -> tuple[Tensor, Stats]:
    """Sum a loss over positions as `position_losses`, differentiated in another way.

    Args:
        hidden_NH: [N, H] student hidden states of the counted positions.
        head: the student's head.
        differentiate: is given a projection [c, V] without the head's scale, cap and temperature, the slice of
            positions it belongs to, and whether a gradient is wanted, which it then writes in the projection's place.
            It yields pieces: some of the positions, their summed loss, and a dictionary of their values.
        rows: positions a chunk.
    """
    dtype = compute_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        total, gradients, stats = _run_chunks(hidden_NH, head, differentiate, rows, dtype)
    if torch.is_grad_enabled():
        total = with_gradients(total, gradients, (hidden_NH, head.weight_VH, head.bias_V))
    return total, stats


def _by_autograd(head: Head, chunk_loss: ChunkLoss) -> Differentiate:
    """Differentiate a loss of fp32 logits, a block of positions at a time."""

    def differentiate(projected_cV: Tensor, part: slice, learns: bool) -> Iterator[Piece]:
        positions, vocabulary = projected_cV.shape
        block = block_rows(vocabulary, projected_cV.device) or max(1, positions)
        # One empty block where nothing is counted, so that the per-position values exist with length zero.
        for inner in list(chunks(positions, block)) or [slice(0, 0)]:
            projected = upcast(projected_cV[inner]).requires_grad_(learns)
            place = slice(part.start + inner.start, part.start + inner.stop)
            loss, stats = chunk_loss(head.shape_logits(projected), place)
            yield place, loss.detach(), stats  # before the gradient takes the place of what values may be views of
            if learns:
                projected_cV[inner] = torch.autograd.grad(loss, projected)[0] if loss.requires_grad else 0.0

    return differentiate


def _run_chunks(
    hidden_NH: Tensor, head: Head, differentiate: Differentiate, rows: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], Stats]:
    hidden, fixed = hidden_NH.detach().to(dtype), head.detach()
    slabs = list(_slabs(len(fixed.weight_VH), hidden.device))
    if len(slabs) == 1:
        fixed = fixed.to(dtype)  # cast once, not at every chunk
    gradients = HeadGradients((hidden_NH, head.weight_VH, head.bias_V))
    total = torch.zeros((), dtype=upcast(hidden[:0]).dtype, device=hidden.device)
    collected: Stats = {}
    for part in list(chunks(len(hidden), rows)) or [slice(0, 0)]:
        logits_cV = _project(hidden[part], fixed)
        for place, loss, stats in differentiate(logits_cV, part, gradients.wanted):
            total += loss
            for name, value in stats.items():
                # Copied into one tensor, for small tensors kept from every block would fragment memory.
                if name not in collected:
                    collected[name] = value.new_empty(len(hidden), *value.shape[1:])
                collected[name][place] = value.detach()
        if gradients.wanted:
            gradients.add(logits_cV, hidden[part], fixed.weight_VH, part, slabs)
    return total, gradients.narrowed(), collected
