"""Choose between a fast path and the plain one, by running both on a probe.

A fast path is another way to compute what a plain one computes: a captured graph, a fused kernel. It is written where
not every device is at hand, so each proves itself where it runs, before the first step. What differs, fails or is
slower is left for the plain path, and the verdict says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_opd.errors import UserError

__all__ = ["KEY", "Verdict", "prove"]

KEY = "optim.paths"
_ROUNDS = 3

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a proof.

    Attributes:
        name: of the fast path, as `captured decoding`.
        taken: the fast path runs.
        reason: why, in words.
        off: largest relative distance of a tensor of the fast path from that of the plain one; None if not compared.
        fast_s: seconds of the fast path on the probe; None if not timed.
        plain_s: seconds of the plain path.
        failed: one of the two could not run the probe.
    """

    name: str
    taken: bool
    reason: str
    off: float | None = None
    fast_s: float | None = None
    plain_s: float | None = None
    failed: bool = False

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.name}: the {'fast' if self.taken else 'plain'} path ({self.reason})"


def prove(
    name: str, plain: Run, fast: Run, bound: float, device: torch.device, choice: str = "auto", unfit: str | None = None
) -> Verdict:
    """Run both paths on a probe and decide which one a run takes.

    Args:
        name: of the fast path.
        plain: computes the probe by the plain path, values and gradients.
        fast: computes the same tensors by the fast path.
        bound: the largest relative distance that rounding explains.
        device: waited for when time is taken.
        choice: `auto` decides by the probe, `plain` does not try, `fast` has no way back.
        unfit: why the fast path cannot run here, None where it can.

    Raises:
        UserError: the choice is `fast`, and the fast path is unfit, fails or differs.

    >>> x = torch.ones(3)
    >>> prove("doubling", lambda: [x + x], lambda: [2 * x], 1e-6, x.device, choice="fast").taken
    True
    """
    if choice == "plain":
        return Verdict(name, False, f"{KEY}=plain")
    if unfit is not None:
        return _left(name, unfit, choice)
    try:
        pairs = list(zip(fast(), plain(), strict=True))
    except Exception as error:  # a kernel's compiler, its launch and its memory fail in classes of their own
        return _left(name, f"on a probe, {type(error).__name__}: {_first_line(error)}", choice, failed=True)
    distances = [_distance(*pair) for pair in pairs]
    off = max(distances, key=lambda distance: math.inf if math.isnan(distance) else distance)
    if not off <= bound:
        return _left(name, f"off by {off:.2g}, where rounding explains {bound:g}", choice, off=off)
    if choice == "fast":
        return Verdict(name, True, f"{KEY}=fast, off by {off:.2g}", off)
    if torch.are_deterministic_algorithms_enabled():  # a resumed run must choose the same, whatever the seconds
        return Verdict(name, True, f"off by {off:.2g}, and not timed under deterministic algorithms", off)
    fast_s, plain_s = _seconds(fast, plain, device)
    told = f"{1e3 * fast_s:.3g} ms against {1e3 * plain_s:.3g} ms, off by {off:.2g}"
    return Verdict(name, fast_s <= plain_s, told, off, fast_s, plain_s)


def _left(name: str, reason: str, choice: str, off: float | None = None, failed: bool = False) -> Verdict:
    if choice == "fast":
        raise UserError(KEY, f"{name} to compute what the plain path does", reason, f"Set {KEY}=auto.")
    return Verdict(name, False, reason, off, failed=failed)


def _distance(found: Tensor, expected: Tensor) -> float:
    wide, own = found.detach().double(), expected.detach().double()
    return float((wide - own).norm() / own.norm().clamp(min=1e-30))


def _seconds(fast: Run, plain: Run, device: torch.device) -> tuple[float, float]:
    """Time both paths in turn and take the medians."""
    taken: dict[Run, list[float]] = {fast: [], plain: []}
    for _ in range(_ROUNDS):
        for run, seconds in taken.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(taken[fast]), statistics.median(taken[plain])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
