"""What the steps of a run cost."""

from __future__ import annotations

from statistics import median
from typing import Any

import lightning as L

__all__ = ["StepSpeed"]

PEAK = "perf/peak_memory_mb"


class StepSpeed(L.Callback):
    """Keeps what every step logs as `perf/*`, to sum it up."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep the step's."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("perf/"):
                self.steps.setdefault(name, []).append(float(value))

    def typical(self) -> dict[str, float]:
        """The median over steps, which a slow first one does not move; of the peak memory, the largest."""
        return {name: max(values) if name == PEAK else median(values) for name, values in self.steps.items()}
