"""Tell where the time and memory of a step go.

The module times its phases with a `Stopwatch`. `fit --profile` hands what torch.profiler recorded to `break_down`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch._C._profiler import RecordScope, _EventType

__all__ = [
    "OTHER", "PHASES", "STEP", "Breakdown", "Part", "Stopwatch", "break_down", "peak_memory_mb", "phase",
]  # fmt: skip

# The named ranges of a step, which any profiler of torch records. `head` lies inside of the phase that reads it; its
# range is opened in `functional.head`, floors below.
PHASES = ("rollout", "teacher", "student", "head", "optimizer")
STEP, OTHER = "step", "other"

phase = torch.profiler.record_function


class Stopwatch:
    """Seconds spent in the named phases of one step.

    Args:
        device: an accelerator is waited for at the end of a phase, so that its work is counted where it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerated = device.type != "cpu"
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Count the time since the last call for `phase`."""
        if self._accelerated:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the beginning to the last lap."""
        return self._last - self._start


def peak_memory_mb(device: torch.device) -> float:
    """Read the most memory ever used, in MB: the accelerator's, or the resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@dataclass(frozen=True)
class Part:
    """The time of a phase or an operator in the mean recorded step, without what is nested in it.

    Attributes:
        seconds: its own.
        share: of the step, 0 to 1.
        calls: how often it ran.
    """

    seconds: float
    share: float
    calls: float


@dataclass(frozen=True)
class Breakdown:
    """The time of the recorded steps, by phase and by operator.

    Attributes:
        steps: how many were recorded.
        step_s: mean seconds a step.
        between_s: mean seconds between two steps, which take data, logging and callbacks; None of a single step.
        phases: by name, one inside of another as `student/head`; with `other` they add up to the step.
        operators: those that took longest themselves, the longest first.
    """

    steps: int
    step_s: float
    between_s: float | None
    phases: dict[str, Part]
    operators: dict[str, Part]


def break_down(recorded: Any, operators: int = 15) -> Breakdown:
    """Sum up what torch.profiler recorded of ranges named `step` with `PHASES` inside.

    Phases are timed on the processor. On an accelerator they are right as far as each ends by waiting for it, as all
    but `head` do.

    Args:
        recorded: `profiler.profiler.kineto_results` of a stopped `torch.profiler.profile`, with one step or more.
        operators: how many to list.
    """
    # Not `key_averages()`, which does not say in which phase a head lies: of 100,000 events it takes 8 s of CPU (torch
    # 2.13), this tree 1.2 s, and a long rollout has a million. torch.profiler's own analyses walk this tree too.
    roots = recorded.experimental_event_tree()
    steps = sorted((root for root in roots if root.name == STEP), key=lambda step: step.start_time_ns)
    phases: dict[str, list[int]] = defaultdict(list)
    work: dict[str, list[int]] = defaultdict(list)
    for root in roots:  # a step, or what another thread does meanwhile
        if _within(root.start_time_ns, steps):
            _count(root, "", phases, work)
    for event in recorded.events():
        accelerated = event.device_type() != torch.autograd.DeviceType.CPU
        if accelerated and not event.is_user_annotation() and _within(event.start_ns(), steps):
            work[event.name()].append(event.duration_ns())
    order = [*PHASES, OTHER]
    labels = sorted(phases, key=lambda label: [order.index(name) for name in label.split("/")])
    gaps = [later.start_time_ns - earlier.end_time_ns for earlier, later in pairwise(steps)]
    return Breakdown(
        steps=len(steps),
        step_s=sum(step.duration_time_ns for step in steps) / len(steps) / 1e9,
        between_s=sum(gaps) / len(gaps) / 1e9 if gaps else None,
        phases={label: _part(phases[label], steps) for label in labels},
        operators={name: _part(work[name], steps) for name in sorted(work, key=lambda n: -sum(work[n]))[:operators]},
    )


def _count(event: Any, around: str, phases: dict[str, list[int]], work: dict[str, list[int]]) -> int:
    """Add the own times of an event, which lies in the phase `around`, and of the events in it, to what is found.

    Returns:
        The nanoseconds that phases in the event take.
    """
    # Allocations and calls of an accelerator's runtime are nodes too: their time is the operator's.
    children = [child for child in event.children if child.tag == _EventType.TorchOp]
    ranged = event.name == STEP or event.name in PHASES
    label = f"{around}/{event.name}".strip("/") if event.name in PHASES else around
    inner = sum(_count(child, label, phases, work) for child in children)
    if ranged:
        phases[label or OTHER].append(event.duration_time_ns - inner)
        return event.duration_time_ns
    if event.tag == _EventType.TorchOp and event.typed[1].scope != RecordScope.USER_SCOPE:
        work[event.name].append(event.duration_time_ns - sum(child.duration_time_ns for child in children))
    return inner


def _within(start: int, steps: Sequence[Any]) -> bool:
    return any(step.start_time_ns <= start < step.end_time_ns for step in steps)


def _part(own: list[int], steps: Sequence[Any]) -> Part:
    whole = sum(step.duration_time_ns for step in steps)
    return Part(sum(own) / len(steps) / 1e9, sum(own) / whole, len(own) / len(steps))
