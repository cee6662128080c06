"""Cut the attention of a packed layout into calls of a kernel that knows no mask.

A kernel for sequences of varying lengths takes the queries and the keys of many sequences end to end, and lets each
query see all keys of its sequence, or all up to its own place when the last query stands at the last key. `flash` calls
it, and adds up what the pieces give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_opd.models.packing import Array, Layout, Segment, on_device

__all__ = ["Piece", "pieces_of"]

# Tokens between two branches that are so few that each segment may have them gathered for itself.
_NEAR = 256


@dataclass(frozen=True)
class Piece:
    """One call of the kernel: C chains of queries, each with the keys that it sees.

    Attributes:
        queries_Q: the tokens whose queries are used, None for all in order.
        keys_K: the tokens whose keys are used, None for all in order.
        ends_q: int32 [C + 1], where each chain's queries begin, and where the last ends.
        ends_k: the same of its keys.
        longest_q: the largest number of queries of a chain.
        longest_k: the largest number of its keys.
        causal: the last query stands at the last key, and none sees a key after its own; else all see all.
        window: each sees at most this many keys, itself included; None for all.
    """

    queries_Q: Tensor | None
    keys_K: Tensor | None
    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool
    window: int | None = None


def pieces_of(layout: Layout, window: int | None = None) -> tuple[Piece, ...]:
    """Make the calls whose outputs together are the attention of a layout, once for all passes that read it.

    Without a window each token sees its own segment up to itself, and all of what leads to the segment. The first needs
    no gathering, for tokens are numbered segment by segment. For the second, the keys of a beginning are gathered once
    for all segments that follow it, so that a long prompt is not repeated for its completions. Where completions branch
    off one after the other, each a few tokens later, they share the keys up to the first branch, and each has the few
    tokens after it gathered before its own. With a window each segment has the last keys that lead to it there.
    """
    key = "pieces", window
    if key not in layout.kept:
        segments = sorted(layout.segments, key=lambda segment: int(segment.path[segment.start]))
        device = layout.ids_N.device
        filler = np.arange(layout.count, len(layout.ids_N))  # sees itself: what no call writes may be NaN
        segments += [Segment(filler, 0)] if len(filler) else []
        made = _whole(segments, device) if window is None else _windowed(segments, window, device)
        layout.kept[key] = made
    return layout.kept[key]


def _whole(segments: list[Segment], device: torch.device) -> tuple[Piece, ...]:
    branches = np.zeros(1 + max(int(s.path[-1]) for s in segments), dtype=bool)  # by the number of a token
    branches[[int(s.path[s.start - 1]) for s in segments if s.start]] = True
    # How much of its path each segment shares: all that leads to it, or that up to a branch shortly before.
    whole, shorter = ([_shared(segment, branches, near) for segment in segments] for near in (0, _NEAR))
    shared = min(whole, shorter, key=lambda lengths: _gathered(segments, lengths))
    own = [s.path[s.start :] for s in segments]
    rest = None if shared == whole else [s.path[length:] for s, length in zip(segments, shared, strict=True)]
    pieces = (_piece(own, rest, device, causal=True),)
    groups: dict[int, list[int]] = {}  # the numbers of the segments that share keys, by the last of these
    for number, length in enumerate(shared):
        if length:
            groups.setdefault(int(segments[number].path[length - 1]), []).append(number)
    if not groups:
        return pieces
    below = [np.concatenate([own[number] for number in group]) for group in groups.values()]
    above = [segments[group[0]].path[: shared[group[0]]] for group in groups.values()]
    return *pieces, _piece(below, above, device, causal=False)


def _shared(segment: Segment, branches: NDArray[np.bool_], near: int) -> int:
    """Return the length up to the first branch on the way to a segment that is at most `near` tokens before it."""
    first = max(0, segment.start - 1 - near)
    found = np.flatnonzero(branches[segment.path[first : segment.start]])
    return first + int(found[0]) + 1 if len(found) else 0


def _gathered(segments: list[Segment], shared: list[int]) -> int:
    """Count the keys that are gathered: once for all that share them, and all of the rest where a segment has one."""
    ends = {int(s.path[length - 1]): length for s, length in zip(segments, shared, strict=True) if length}
    rest = [len(s.path) - length for s, length in zip(segments, shared, strict=True)]
    whole = all(s.start == length for s, length in zip(segments, shared, strict=True))
    return sum(ends.values()) + (0 if whole else sum(rest))


def _windowed(segments: list[Segment], window: int, device: torch.device) -> tuple[Piece, ...]:
    own = [s.path[s.start :] for s in segments]
    seen = [s.path[max(0, s.start - window + 1) :] for s in segments]
    return (_piece(own, seen, device, causal=True, window=window),)


def _piece(
    own: list[Array], seen: list[Array] | None, device: torch.device, causal: bool, window: int | None = None
) -> Piece:
    """Join chains of queries and of keys, which without keys are the queries' own tokens, all in order."""
    queries, keys = [len(chain) for chain in own], [len(chain) for chain in (seen or own)]
    arrays = [np.cumsum([0, *queries]), np.cumsum([0, *keys])]
    arrays += [] if seen is None else [np.concatenate(own), np.concatenate(seen)]
    ends_q, ends_k, *gathered = on_device(arrays, device)
    chosen, looked_at = gathered if gathered else (None, None)
    if causal:
        chosen = None  # the chains of all tokens, in order
    return Piece(chosen, looked_at, ends_q.int(), ends_k.int(), max(queries), max(keys), causal, window)
