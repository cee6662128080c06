"""Keep a short stand-in for a long gradient.

`measure` and `audit` compare gradients of estimators by it, and `callbacks.TeacherGradients` those of teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lit_opd.functional import upcast

__all__ = ["Sketch"]


class Sketch:
    """A linear map to `size` dimensions that keeps inner products, in expectation over its random signs.

    Coordinates, counted through all parameters, get a random sign and are summed `size` apart: with a and b of unit
    length, the inner product of their sketches is that of a and b, give or take sqrt(2 / size). Gradients that are
    short enough stay as they are. Source: the count sketch (Charikar, Chen and Farach-Colton, 2002) with places in turn
    instead of hashed ones.
    """

    def __init__(self, parameters: Sequence[Tensor], size: int, seed: int) -> None:
        self.coordinates = sum(p.numel() for p in parameters)
        self.size = min(size, self.coordinates)
        self._places = [place % self.size for place in accumulate((p.numel() for p in parameters), initial=0)]
        generator = torch.Generator().manual_seed(seed)
        self._signs: list[Tensor] | None = None
        if size < self.coordinates:
            self._signs = [
                (torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8) * 2 - 1).to(p.device)
                for p in parameters
            ]

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """Sketch gradients, in the order of the parameters: [size] fp32 (float64 stays), on the CPU."""
        total = upcast(gradients[0].flatten()[:0]).new_zeros(self.size)
        for number, gradient in enumerate(gradients):
            self.add(total, number, gradient)
        return total.cpu()

    def add(self, total: Tensor, number: int, gradient: Tensor) -> None:
        """Add the gradient of one parameter, by its number, to a sketch [size]."""
        place, signed = self._places[number], upcast(gradient).flatten()
        if self._signs is not None:
            signed = signed * self._signs[number]
        room = self.size - place
        total[place : place + len(signed)] += signed[:room]
        for part in signed[room:].split(self.size):
            total[: len(part)] += part
