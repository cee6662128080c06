"""Lay sequences end to end, with every shared beginning held once.

Completions of one prompt repeat it, and chat templates begin every prompt with the same words. A causal model gives a
token the same hidden state whatever follows it, so a beginning that several rows share is computed once. The rows form
a tree, each of whose nodes is one token, and no padding enters the model's body. `PackedForward` and `LlamaForward`
read rollouts this way, `FusedDecoder` reads prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_opd.functional.precision import upcast
from lit_opd.types import Rollout

__all__ = ["Array", "Layout", "Segment", "gather_rows", "layout_of", "on_device", "pack"]

Array = NDArray[np.int64]

# The fewest tokens that make a shared beginning a segment of its own: segments are padded to one length.
_WORTH_SPLITTING = 16


class Segment(NamedTuple):
    """A chain of tokens, on the host.

    Attributes:
        path: the tokens that lead to its end, from the first of the sequence, and its own.
        start: how many tokens lead to its first. Its own tokens have consecutive numbers.
    """

    path: Array
    start: int


@dataclass(frozen=True)
class Layout:
    """N tokens of a tree, cut into the S segments that attention sees.

    A segment is a chain of tokens, its queries. Its keys are these tokens and all that lead to them.

    Attributes:
        ids_N: token ids; a few at the end may be filler, which no segment holds.
        positions_N: place of each token in its sequence, from 0.
        queries_SL: the tokens of each segment; 0 where there is none.
        keys_SM: the tokens that lead to the end of each segment, from the first of the sequence; 0 where there is none.
        last_seen_SL: the last of its segment's keys that each query may look at, counted from 0.
        place_N: where each token stands in `queries_SL`, flattened.
        segments: the segments on the host.
        count: how many tokens are no filler.
        kept: what `flash_pieces` and `packed_mixers` made of the segments, for all passes that read the layout.
    """

    ids_N: Tensor
    positions_N: Tensor
    queries_SL: Tensor
    keys_SM: Tensor
    last_seen_SL: Tensor
    place_N: Tensor
    segments: tuple[Segment, ...] = field(repr=False)
    count: int
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    _biases: dict[tuple[torch.dtype, int | None], Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def seen_SLM(self) -> Tensor:
        """True where a query may look at a key. Padding queries look at the first key."""
        return torch.arange(self.keys_SM.shape[1], device=self.keys_SM.device) <= self.last_seen_SL[:, :, None]

    def bias(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Make what is added to attention scores, 0 where seen and minus infinity elsewhere, once for all layers."""
        if (dtype, window) not in self._biases:
            seen_SLM = self.within_SLM(window)
            zeros_SLM = torch.zeros(seen_SLM.shape, dtype=dtype, device=seen_SLM.device)
            self._biases[dtype, window] = zeros_SLM.masked_fill_(~seen_SLM, -torch.inf)
        return self._biases[dtype, window]

    def within_SLM(self, window: int | None) -> Tensor:
        """Make `seen_SLM` for queries that see at most so many keys, themselves included, or all keys where None."""
        if window is None:
            return self.seen_SLM
        positions_M = torch.arange(self.keys_SM.shape[1], device=self.keys_SM.device)
        return self.seen_SLM & (self.positions_N[self.queries_SL][:, :, None] - positions_M < window)


_LAYOUTS: WeakKeyDictionary[Rollout, tuple[Layout, Tensor]] = WeakKeyDictionary()


def pack(sequences: Sequence[list[int]], device: torch.device) -> tuple[Layout, list[list[int]]]:
    """Lay out sequences of token ids, none of them empty.

    Returns:
        The layout, and for each row the indices of its tokens in the layout.
    """
    layout, paths = _pack([np.array(sequence, dtype=np.int64) for sequence in sequences], device)
    return layout, [path.tolist() for path in paths]


def _pack(sequences: list[Array], device: torch.device) -> tuple[Layout, list[Array]]:
    paths = [sequence[:0] for sequence in sequences]
    own_start, branch = [0] * len(sequences), [0] * len(sequences)
    # In lexicographic order, no earlier row shares a longer beginning with a row than the one before it. The bytes of
    # big-endian numbers that are not negative have the order of the numbers.
    order = sorted(range(len(sequences)), key=lambda row: sequences[row].astype(">i8").tobytes())
    first_own: list[int] = []  # the number of the first token of its own, for each row in that order
    ids: list[Array] = []
    count = 0
    for row, previous in zip(order, [None, *order], strict=False):
        sequence = sequences[row]
        shared = 0 if previous is None else _shared(sequences[previous], sequence)
        beginning = sequence[:0]
        if previous is not None and shared:
            beginning = paths[previous][:shared]
            parent = order[bisect_right(first_own, beginning[-1]) - 1]
            branch[parent] = max(branch[parent], shared)
        own_start[row] = shared
        first_own.append(count)
        ids.append(sequence[shared:])
        paths[row] = np.concatenate([beginning, np.arange(count, count + len(ids[-1]))])
        count += len(ids[-1])
    segments = [
        Segment(paths[row][:stop], start)
        for row, path in enumerate(paths)
        for start, stop in _split(own_start[row], branch[row], len(path))
    ]
    return _layout(np.concatenate(ids), tuple(segments), device), paths


def _shared(a: Array, b: Array) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _split(start: int, branch: int, stop: int) -> list[tuple[int, int]]:
    """Cut a row's own tokens where other rows branch off, so that segments have similar lengths."""
    if start == stop:
        return []
    return [(start, branch), (branch, stop)] if start + _WORTH_SPLITTING <= branch < stop else [(start, stop)]


def _layout(ids: Array, segments: tuple[Segment, ...], device: torch.device) -> Layout:
    longest_query = _rounded(max(len(path) - start for path, start in segments), 8)
    longest_key = _rounded(max(len(path) for path, _ in segments), 8)
    queries = np.zeros((len(segments), longest_query), dtype=np.int64)
    keys = np.zeros((len(segments), longest_key), dtype=np.int64)
    last_seen = np.zeros_like(queries)
    tokens, positions, places = np.zeros((3, _rounded(len(ids), 64)), dtype=np.int64)
    tokens[: len(ids)] = ids
    for number, (path, start) in enumerate(segments):
        own, length = path[start:], len(path) - start
        queries[number, :length], keys[number, : len(path)] = own, path
        last_seen[number, :length] = positions[own] = np.arange(start, len(path))
        places[own] = number * longest_query + np.arange(length)
    made = on_device([tokens, positions, queries, keys, last_seen, places], device)
    ids_N, positions_N, queries_SL, keys_SM, last_seen_SL, place_N = made
    return Layout(ids_N, positions_N, queries_SL, keys_SM, last_seen_SL, place_N, segments, len(ids))


def _rounded(length: int, unit: int) -> int:
    """Round a length up to a multiple of `unit`, unless it is short.

    Lengths that never repeat fragment the allocator's memory: freed blocks fit no later tensor.
    """
    return length if length < 8 * unit else -(-length // unit) * unit


def on_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Bring arrays of int64 to a device, to a CUDA device in one copy that the host does not wait for."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    # A copy out of memory that is not pinned waits until the device has done all that was asked of it before.
    joined = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
    parts = joined.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def layout_of(rollout: Rollout) -> tuple[Layout, Tensor]:
    """Lay out prompts and completions, once for all models that read the rollout.

    Returns:
        The layout, and for each counted token, row by row, the index of the token that predicts it. Every call returns
        a fresh copy of the layout, so that its attention masks, much larger than the rest, live only as long as a pass.
    """
    if rollout not in _LAYOUTS:
        _LAYOUTS[rollout] = _pack_rollout(rollout)
    layout, predictors_N = _LAYOUTS[rollout]
    return replace(layout), predictors_N


def _pack_rollout(rollout: Rollout) -> tuple[Layout, Tensor]:
    sequences, predictors = [], []
    rows = list(zip(*_on_host(*rollout.prompts, rollout.ids_BT, rollout.real_BT, rollout.mask_BT), strict=True))
    for prompt_ids, prompt_mask, completion_ids, real, counted in rows:
        prompt, completion = _within(prompt_ids, prompt_mask), _within(completion_ids, real)
        # Tokens after the last one that predicts a counted token are left out. A row that counts none keeps its prompt.
        before = len(prompt) + np.flatnonzero(counted) - 1
        sequences.append(np.concatenate([prompt, completion])[: before[-1] + 1 if len(before) else len(prompt)])
        predictors.append(before)
    layout, paths = _pack(sequences, rollout.mask_BT.device)
    chosen = [path[before] for path, before in zip(paths, predictors, strict=True)]
    return layout, on_device([np.concatenate(chosen)], rollout.mask_BT.device)[0]


def _on_host(*tensors: Tensor) -> list[Array]:
    """Copy tensors [B, ...] to the host as int64, all at once, for each copy waits for the device."""
    joined = torch.cat([tensor.long() for tensor in tensors], dim=1).cpu().numpy()
    return np.split(joined, np.cumsum([tensor.shape[1] for tensor in tensors])[:-1], axis=1)


def _within(ids: Array, mask: Array) -> Array:
    """Select the tokens of a mask that is True at neighbours only."""
    start = int(mask.argmax())
    return ids[start : start + int(mask.sum())]


class _GatherRows(torch.autograd.Function):
    """Row selection whose gradient is summed in fp32, for a token of a shared beginning gets one from every row."""

    @staticmethod
    def forward(ctx: Any, values_NF: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(values_NF)
        return values_NF[index]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = upcast(upstream)
        sums = wide.new_zeros(ctx.rows, *upstream.shape[index.dim() :])
        sums.index_add_(0, index.flatten(), wide.flatten(0, index.dim() - 1))
        return sums.to(upstream.dtype), None


def gather_rows(values_NF: Tensor, index: Tensor) -> Tensor:
    """Select rows `values_NF[index]`, of shape [*index, F], with a gradient summed in fp32 whatever the dtype."""
    return _GatherRows.apply(values_NF, index)
