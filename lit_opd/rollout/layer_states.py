"""Keep the states of a cache's layer where they are, and let the model's own code write them in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer

from lit_opd.rollout.token_parts import Column

__all__ = ["LayerStates", "is_known"]

# Kinds of layers whose states are known, by the names that transformers 5.24 gives them.
_KNOWN = ["DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer",
          "LinearAttentionAndSlidingWindowAttentionLayer", "DummyLayer"]  # fmt: skip
# Attributes of a layer that hold its states by number.
_NUMBERED = ("conv_states", "recurrent_states")


def is_known(layer: Any) -> bool:
    """Tell whether `LayerStates` knows the states of a cache's layer."""
    numbered = all(isinstance(getattr(layer, kind, {}), dict) for kind in _NUMBERED)  # single ones in earlier releases
    return numbered and type(layer) in {getattr(cache_utils, name, None) for name in _KNOWN}


class LayerStates:
    """The states of one layer for so many rows and columns at most: keys and values, convolutions, recurrences.

    Args:
        like: a layer of the model's cache for one row, whose kind and shapes these have.
        rows: at most.
        width: columns at most.
    """

    def __init__(self, like: Any, rows: int, width: int) -> None:
        self._like = like
        self._by_column = [x.new_zeros(rows, x.shape[1], width, x.shape[3]) for x in _keys_and_values(like)]
        self._numbered = {key: x.new_zeros(rows, *x.shape[1:]) for key, x in _numbered(like)}

    def clear(self) -> None:
        """Forget what earlier rollouts wrote: a NaN would be one in a masked column, too, for 0 x NaN is NaN."""
        for state in (*self._by_column, *self._numbered.values()):
            state.zero_()

    def take(self, layer: Any, rows_R: Tensor, count: int, end: int) -> None:
        """Copy the states of a layer of the model's own cache, each of its rows `count` times, up to a column."""
        for kept, state in zip(self._by_column, _keys_and_values(layer), strict=True):
            # A layer with a window holds its last columns alone.
            kept[rows_R, :, end - state.shape[2] : end] = state.repeat_interleave(count, dim=0)
        for key, state in _numbered(layer):
            self._numbered[key][rows_R] = state.repeat_interleave(count, dim=0)

    def at(self, rows: int, width: int, column: Column) -> Any:
        """Make a layer of a cache of the first rows and columns, which writes keys and values at a column."""
        layer = copy.copy(self._like)
        for kind in _NUMBERED:
            states = {n: state[:rows] for (name, n), state in self._numbered.items() if name == kind}
            if states:
                setattr(layer, kind, getattr(layer, kind) | states)
        if self._by_column:
            layer.keys, layer.values = (state[:rows, :, :width] for state in self._by_column)
            layer.update = partial(_write, layer.keys, layer.values, column)
        return layer

    def select(self, index: Tensor) -> None:
        """Put the chosen rows first, in place."""
        for state in (*self._by_column, *self._numbered.values()):
            state[: len(index)] = state[index]


def _keys_and_values(layer: Any) -> list[Any]:
    return [layer.keys, layer.values] if isinstance(layer, DynamicLayer) else []


def _numbered(layer: Any) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for kind in _NUMBERED:
        for number, state in getattr(layer, kind, {}).items():
            if state is not None:
                yield (kind, number), state


def _write(
    keys: Tensor, values: Tensor, column: Column, key: Tensor, value: Tensor, *others: Any, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Do what `update` of a cache's layer does, for one token."""
    for kept, new in ((keys, key), (values, value)):
        if isinstance(column, int):
            kept[:, :, column] = new[:, :, 0]
        else:
            kept.index_copy_(2, column, new)
    return keys, values
