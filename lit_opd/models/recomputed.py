"""Let autograd keep how a tensor is computed instead of the tensor, where that costs next to nothing.

Linear layers and attention keep their inputs for the backward pass. In a layer of Llama these are norms, rotations and
gated activations of tensors that are kept anyway, so they are computed again there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["made_by"]


@contextmanager
def made_by(lean: bool, function: Callable[..., Any], *inputs: Any) -> Iterator[Any]:
    """Compute `function(*inputs)`, and keep the inputs in its place for what runs while the context is open.

    Args:
        lean: do so; otherwise what runs keeps what it keeps.
        function: of tensors and other things to a tensor, or to several in one storage.
        inputs: tensors that do not change until the backward pass, and others.
    """
    made = function(*inputs)
    if not lean:
        yield made
        return
    sources = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    again = _Again(lambda: _first(function(*sources)))
    storage = _first(made).untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Any:
        return again.view(saved) if saved.untyped_storage().data_ptr() == storage else saved

    def unpack(kept: Any) -> Tensor:
        return kept() if callable(kept) else kept

    with saved_tensors_hooks(pack, unpack):
        yield made


def _first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


class _Again:
    """Computes a tensor once for all who ask for a view of it, and holds it until the last of them has."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._function = function
        self._views = self._asked = 0
        self._made: Tensor | None = None

    def view(self, saved: Tensor) -> Callable[[], Tensor]:
        """Return what makes the same view of the tensor that is computed again."""
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset()
        self._views += 1

        def make() -> Tensor:
            if self._made is None:
                with torch.no_grad():
                    self._made = self._function()
            found, self._asked = self._made.as_strided(size, stride, offset), self._asked + 1
            if self._asked % self._views == 0:
                self._made = None
            return found

        return make
