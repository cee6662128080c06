"""Cut the attention of a packed layout into calls of a kernel that knows no mask.

A kernel for sequences of varying lengths takes the queries and the keys of many sequences end to end, and lets each
query see all keys of its sequence, or all up to its own place when the last query stands at the last key. `flash` calls
it, and adds up what the pieces give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_opd.models.packing import Array, Layout, Segment, on_device

__all__ = ["Piece", "pieces_of"]


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
    for all segments that follow it, so that a long prompt is not repeated for its completions. With a window each
    segment has the last keys that lead to it gathered before its own.
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
    own = _piece([s.path[s.start :] for s in segments], None, device, causal=True)
    followers: dict[int, list[Segment]] = {}  # the segments that follow a token, by its number
    for segment in segments:
        if segment.start:
            followers.setdefault(int(segment.path[segment.start - 1]), []).append(segment)
    if not followers:
        return (own,)
    below = [np.concatenate([s.path[s.start :] for s in group]) for group in followers.values()]
    above = [group[0].path[: group[0].start] for group in followers.values()]
    return own, _piece(below, above, device, causal=False)


def _windowed(segments: list[Segment], window: int, device: torch.device) -> tuple[Piece, ...]:
    own = [s.path[s.start :] for s in segments]
    seen = [s.path[max(0, s.start - window + 1) :] for s in segments]
    return (_piece(own, seen, device, causal=True, window=window),)


def _piece(
    own: list[Array], seen: list[Array] | None, device: torch.device, causal: bool, window: int | None = None
) -> Piece:
    """Join chains of queries and of keys; without keys these are the queries' own tokens, all in order."""
    queries, keys = [len(chain) for chain in own], [len(chain) for chain in (seen or own)]
    arrays = [np.cumsum([0, *queries]), np.cumsum([0, *keys])]
    arrays += [] if seen is None else [np.concatenate(own), np.concatenate(seen)]
    ends_q, ends_k, *gathered = on_device(arrays, device)
    chosen, looked_at = gathered if gathered else (None, None)
    if causal:
        chosen = None  # the chains of all tokens, in order
    return Piece(chosen, looked_at, ends_q.int(), ends_k.int(), max(queries), max(keys), causal, window)
