"""Where the seconds of a step go, seen from outside: functions are replaced by ones that take the time."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SPLIT = ("rollout_s", "teacher_s", "student_s", "head_s", "optimizer_s")


class Phases:
    """Seconds by phase since the last `take`; what runs inside another phase counts for itself alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._within = 0.0  # of the phase that is running, what other phases inside it have taken

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time spent inside is the phase's."""
        outside, self._within = self._within, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[phase] += spent - self._within
            self._within = outside + spent

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time every call of a function, or of a method of a class or an object."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(phase):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    def wrap_optimizer(self) -> None:
        """Time clipping and stepping, which both sides do by the same functions of torch."""
        self.wrap(torch.nn.utils, "clip_grad_norm_", "optimizer_s")
        self.wrap(torch.optim.AdamW, "step", "optimizer_s")

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
