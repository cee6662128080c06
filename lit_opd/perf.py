"""What a step logs, and where its time and memory go."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch

__all__ = ["Stopwatch", "peak_memory_mb", "step_report"]


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


def step_report(
    update: Mapping[str, float], rollout: Mapping[str, float], watch: Stopwatch, device: torch.device
) -> dict[str, float]:
    """The metrics of a step, the same keys whatever the estimator.

    Args:
        update: totals of the last update: `loss` and `grad_norm`; over the tokens that the student wrote, `kl`,
            `entropy`, `gap` and their number `own`.
        rollout: totals over sequences, from `rollout_sums`.
        watch: seconds of each phase.
        device: whose memory is reported.
    """
    tokens, rows = max(update["own"], 1.0), max(rollout["rows"], 1.0)
    return {
        "train/loss": update["loss"],
        "train/reverse_kl": update["kl"] / tokens,
        "train/entropy": update["entropy"] / tokens,
        "train/grad_norm": update["grad_norm"],
        **{f"rollout/{name}": value / rows for name, value in rollout.items() if name != "rows"},
        "rollout/sampler_gap": update["gap"] / tokens,
        "perf/tokens_per_s": rollout["length"] / watch.total,
        **{f"perf/{phase}": seconds for phase, seconds in watch.seconds.items()},
        "perf/step_s": watch.total,
        "perf/peak_memory_mb": peak_memory_mb(device),
    }
