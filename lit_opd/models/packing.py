"""Lay sequences end to end, with every shared beginning held once.

Completions of one prompt repeat it, and chat templates begin every prompt with the same words. A causal model gives a
token the same hidden state whatever follows it, so a beginning that several rows share is computed once. The rows form
a tree, each of whose nodes is one token, and no padding enters the model's body. `PackedForward` and `LlamaForward`
read rollouts this way, `FusedDecoder` reads prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast
from lit_opd.types import Rollout

__all__ = ["Layout", "as_bias", "gather_rows", "layout_of", "pack"]

# The fewest tokens that make a shared beginning a segment of its own: segments are padded to one length.
_WORTH_SPLITTING = 16


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
    """

    ids_N: Tensor
    positions_N: Tensor
    queries_SL: Tensor
    keys_SM: Tensor
    last_seen_SL: Tensor
    place_N: Tensor
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def seen_SLM(self) -> Tensor:
        """True where a query may look at a key. Padding queries look at the first key."""
        return torch.arange(self.keys_SM.shape[1], device=self.keys_SM.device) <= self.last_seen_SL[:, :, None]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Make the mask that is added to attention scores, once for all layers of a pass."""
        if dtype not in self._biases:
            self._biases[dtype] = as_bias(self.seen_SLM, dtype)
        return self._biases[dtype]

    @property
    def distances_SLM(self) -> Tensor:
        """Position of the query minus position of the key, which an attention window limits."""
        positions_M = torch.arange(self.keys_SM.shape[1], device=self.keys_SM.device)
        return self.positions_N[self.queries_SL][:, :, None] - positions_M


_LAYOUTS: WeakKeyDictionary[Rollout, tuple[Layout, Tensor]] = WeakKeyDictionary()


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask into numbers to add to attention scores: 0 where seen, minus infinity elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def pack(sequences: Sequence[list[int]], device: torch.device) -> tuple[Layout, list[list[int]]]:
    """Lay out sequences of token ids, none of them empty.

    Returns:
        The layout, and for each row the indices of its tokens in the layout.
    """
    paths: list[list[int]] = [[] for _ in sequences]
    ids: list[int] = []
    owner: list[int] = []
    own_start, branch = [0] * len(sequences), [0] * len(sequences)
    previous: int | None = None
    # In lexicographic order, no earlier row shares a longer beginning with a row than the one before it.
    for row in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[row]
        shared = 0 if previous is None else _shared(sequences[previous], sequence)
        if previous is not None and shared:
            paths[row] = paths[previous][:shared]
            parent = owner[paths[row][-1]]
            branch[parent] = max(branch[parent], shared)
        own_start[row] = shared
        paths[row] += range(len(ids), len(ids) + len(sequence) - shared)
        ids += sequence[shared:]
        owner += [row] * (len(sequence) - shared)
        previous = row
    segments = [
        (paths[row][:stop], start)
        for row, path in enumerate(paths)
        for start, stop in _split(own_start[row], branch[row], len(path))
    ]
    return _layout(ids, segments, device), paths


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _split(start: int, branch: int, stop: int) -> list[tuple[int, int]]:
    """Cut a row's own tokens where other rows branch off, so that segments have similar lengths."""
    if start == stop:
        return []
    return [(start, branch), (branch, stop)] if start + _WORTH_SPLITTING <= branch < stop else [(start, stop)]


def _layout(ids: list[int], segments: list[tuple[list[int], int]], device: torch.device) -> Layout:
    longest_query = _rounded(max(len(path) - start for path, start in segments), 8)
    longest_key = _rounded(max(len(path) for path, _ in segments), 8)
    queries = [path[start:] + [0] * (longest_query - len(path) + start) for path, start in segments]
    keys = [path + [0] * (longest_key - len(path)) for path, _ in segments]
    positions, places = [0] * len(ids), [0] * len(ids)
    for number, (path, start) in enumerate(segments):
        for place, token in enumerate(path[start:]):
            positions[token], places[token] = start + place, number * longest_query + place
    starts, stops = ([[pair] for pair in column] for column in zip(*((s, len(p)) for p, s in segments), strict=True))
    last_seen_SL = torch.tensor(starts) + torch.arange(longest_query)
    exists_SL = last_seen_SL < torch.tensor(stops)
    last_seen_SL = torch.where(exists_SL, last_seen_SL, 0)
    filler = [0] * (_rounded(len(ids), 64) - len(ids))
    ids, positions, places = ids + filler, positions + filler, places + filler
    lists = (torch.tensor(values, device=device) for values in (ids, positions, queries, keys, places))
    ids_N, positions_N, queries_SL, keys_SM, place_N = lists
    return Layout(ids_N, positions_N, queries_SL, keys_SM, last_seen_SL.to(device), place_N)


def _rounded(length: int, unit: int) -> int:
    """Round a length up to a multiple of `unit`, unless it is short.

    Lengths that never repeat fragment the allocator's memory: freed blocks fit no later tensor.
    """
    return length if length < 8 * unit else -(-length // unit) * unit


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
    prompts = _rows(*rollout.prompts)
    completions = _rows(rollout.ids_BT, rollout.real_BT)
    # Tokens after the last one that predicts a counted token are left out. A row that counts none keeps its prompt.
    counted = [[t for t, yes in enumerate(row) if yes] for row in rollout.mask_BT.tolist()]
    sequences = [
        (prompt + completion)[: len(prompt) + (places[-1] if places else 0)] or prompt
        for prompt, completion, places in zip(prompts, completions, counted, strict=True)
    ]
    layout, paths = pack(sequences, rollout.mask_BT.device)
    predictors = [
        path[len(prompt) + t - 1] for path, prompt, places in zip(paths, prompts, counted, strict=True) for t in places
    ]
    return layout, torch.tensor(predictors, dtype=torch.long, device=rollout.mask_BT.device)


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    lengths, starts = mask.sum(1).tolist(), mask.long().argmax(1).tolist()
    return [row[s : s + n] for row, s, n in zip(ids.tolist(), starts, lengths, strict=True)]


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
