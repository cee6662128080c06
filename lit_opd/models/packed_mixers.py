"""Run layers that carry a state from token to token over a packed layout, row by row.

Linear attention knows no mask, and its state branches where rows do. Its layers see each row whole, from the first
token on, while the rest of the body (attention, MLP, experts) has every shared beginning once. `packed_layers` puts
these layers in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from lit_opd.models.packing import Layout, gather_rows, on_device

__all__ = ["by_rows", "mixers"]


def mixers(body: Any) -> list[nn.Module]:
    """Find the linear attention of a hybrid body (Qwen3-Next, Qwen3.5, OLMo Hybrid): one module in each such layer."""
    return [layer.linear_attn for layer in getattr(body, "layers", ()) if hasattr(layer, "linear_attn")]


@contextmanager
def by_rows(modules: Sequence[nn.Module], layout: Layout) -> Iterator[None]:
    """Make modules take the tokens of a packed layout, [1, N, H], while the context is open."""
    own = [(module, vars(module).get("forward")) for module in modules]
    for module in modules:
        module.forward = partial(_mix_rows, module.forward, layout)
    try:
        yield
    finally:
        for module, forward in own:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _mix_rows(forward: Callable[..., Tensor], layout: Layout, /, hidden_states: Tensor, **others: Any) -> Tensor:
    tokens_BL, home_N = _rows_of(layout)
    # Without a mask, for padding comes after a row, and no token looks ahead.
    inputs = {name: value for name, value in others.items() if name not in ("attend", "attention_mask", "layout")}
    mixed_BLH = forward(hidden_states=gather_rows(hidden_states[0], tokens_BL), **inputs)
    return gather_rows(mixed_BLH.flatten(0, 1), home_N)[None]


def _rows_of(layout: Layout) -> tuple[Tensor, Tensor]:
    """Tell the tokens of the longest rows [B, L], 0 where there is none, and where in it each token stands [N]."""
    if "rows" not in layout.kept:
        followed = {int(segment.path[segment.start - 1]) for segment in layout.segments if segment.start}
        paths = [segment.path for segment in layout.segments if int(segment.path[-1]) not in followed]
        tokens = np.zeros((len(paths), max(map(len, paths))), dtype=np.int64)
        home = np.zeros(len(layout.ids_N), dtype=np.int64)
        for row, path in enumerate(paths):
            tokens[row, : len(path)] = path
            home[path] = row * tokens.shape[1] + np.arange(len(path))
        layout.kept["rows"] = on_device([tokens, home], layout.ids_N.device)
    tokens_BL, home_N = layout.kept["rows"]
    return tokens_BL, home_N
