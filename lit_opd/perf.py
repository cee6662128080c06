"""Where the time and memory of a step go."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, NamedTuple

import torch

__all__ = [
    "OTHER", "PHASES", "STEP", "Breakdown", "Part", "Span", "Stopwatch", "break_down", "own_times", "peak_memory_mb",
    "phase", "read_trace",
]  # fmt: skip

# The named ranges of a step, which any profiler of torch records. `head` lies inside of the phase that reads it; its
# range is opened in `functional.head`, floors below.
PHASES = ("rollout", "teacher", "student", "head", "optimizer")
STEP, OTHER = "step", "other"

phase = torch.profiler.record_function

# What a trace calls work, on the processor and on an accelerator.
_WORK = ("cpu_op", "kernel", "gpu_memcpy", "gpu_memset")


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
    """The most memory ever used, in MB: the accelerator's, or the resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class Span(NamedTuple):
    """A named stretch of time of a trace, in microseconds; spans of one lane nest."""

    name: str
    start: float
    end: float
    kind: str = "cpu_op"
    lane: tuple[Any, ...] = ()

    @property
    def length(self) -> float:
        """Microseconds from start to end."""
        return self.end - self.start

    def within(self, others: Iterable[Span]) -> bool:
        """Whether it lies inside of one of the others."""
        return any(other.start <= self.start and self.end <= other.end for other in others)


@dataclass(frozen=True)
class Part:
    """What a phase or an operator takes of the mean recorded step, without what is nested in it.

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
    """Where the time of the recorded steps went.

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


def read_trace(file: IO[str]) -> list[Span]:
    """The timed events of a chrome trace; each is cut down as it is parsed, for there may be millions."""

    def cut(item: dict[str, Any]) -> Any:
        if item.get("ph") != "X":
            return item if "traceEvents" in item else None
        start, lane = item["ts"], (item["pid"], item["tid"])
        return Span(sys.intern(item["name"]), start, start + item["dur"], sys.intern(item["cat"]), lane)

    return [span for span in json.load(file, object_hook=cut)["traceEvents"] if span is not None]


def break_down(spans: Sequence[Span], operators: int = 15) -> Breakdown:
    """Sum up what torch.profiler recorded of ranges named `step` with `PHASES` inside.

    Phases are timed on the processor. On an accelerator they are right as far as each ends by waiting for it, as all
    but `head` do.

    Args:
        spans: one step or more, and what lies in them.
        operators: how many to list.
    """
    ranges = [span for span in spans if span.kind == "user_annotation"]
    steps = sorted((span for span in ranges if span.name == STEP), key=lambda span: span.start)
    phases = [span for span in ranges if span.name in (STEP, *PHASES) and span.within(steps)]
    gaps = [later.start - earlier.end for earlier, later in pairwise(steps)]
    work = _own_by_name(span for span in spans if span.kind in _WORK and span.within(steps))
    longest = sorted(work, key=lambda name: -sum(work[name]))[:operators]
    return Breakdown(
        steps=len(steps),
        step_s=sum(step.length for step in steps) / len(steps) / 1e6,
        between_s=sum(gaps) / len(gaps) / 1e6 if gaps else None,
        phases=_phases(phases, steps),
        operators={name: _part(work[name], steps) for name in longest},
    )


def own_times(spans: Iterable[Span]) -> list[tuple[Span, Span | None, float]]:
    """For every span of a lane the one it lies in and the time that is its own, so that no time counts twice."""
    ordered = sorted(spans, key=lambda span: (span.start, -span.end))
    own = [span.length for span in ordered]
    parents: list[Span | None] = []
    around: list[int] = []
    for number, span in enumerate(ordered):
        while around and ordered[around[-1]].end <= span.start:
            around.pop()
        parents.append(ordered[around[-1]] if around else None)
        if around:
            own[around[-1]] -= span.length
        around.append(number)
    return list(zip(ordered, parents, own, strict=True))


def _own_by_name(spans: Iterable[Span]) -> dict[str, list[float]]:
    lanes, found = defaultdict(list), defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    for lane in lanes.values():
        for span, _, own in own_times(lane):
            found[span.name].append(own)
    return found


def _phases(ranges: list[Span], steps: list[Span]) -> dict[str, Part]:
    times = defaultdict(list)
    for span, parent, own in own_times(ranges):
        nested = parent is not None and parent.name != STEP
        label = OTHER if span.name == STEP else f"{parent.name}/{span.name}" if nested and parent else span.name
        times[label].append(own)
    order = [*PHASES, OTHER]
    labels = sorted(times, key=lambda label: [order.index(name) for name in label.split("/")])
    return {label: _part(times[label], steps) for label in labels}


def _part(own: list[float], steps: list[Span]) -> Part:
    whole = sum(step.length for step in steps)
    return Part(sum(own) / len(steps) / 1e6, sum(own) / whole, len(own) / len(steps))
