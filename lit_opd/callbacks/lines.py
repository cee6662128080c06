"""Tell the progress of a run in plain lines, for log files, where a bar would write over itself.

`runs.lightning_trainer` takes it instead of `StepProgress` where standard error is no terminal.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lit_opd.callbacks.pace import is_due
from lit_opd.callbacks.progress import numbers_to_watch
from lit_opd.module import DistillationModule

__all__ = ["StepLines"]


class StepLines(ProgressBar):
    """A line for each evaluation, and one every so many optimizer steps: steps, time, numbers to watch."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self._enabled = True
        self._begun, self._first = 0.0, 0

    def disable(self) -> None:
        """Tell nothing (Lightning calls this on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Tell again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count the time."""
        self._begun, self._first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DistillationModule, *_: Any) -> None:  # type: ignore[override]
        """Tell the step where it is due, and the first one, whose time says how long the run will be."""
        step, updates = trainer.global_step, pl_module.optim_config.updates_per_rollout
        if self.every and (is_due(pl_module, step, self.every) or step == self._first + updates):
            numbers = ", ".join(f"{label} {value}" for label, value in numbers_to_watch(trainer).items())
            self._tell(f"{self._where(trainer)}: {numbers}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell who is measured."""
        self._tell(f"step {trainer.global_step}: measuring the {pl_module.judged}")

    on_test_start = on_validation_start

    def _where(self, trainer: L.Trainer) -> str:
        done, seconds = trainer.global_step - self._first, time.monotonic() - self._begun
        if trainer.max_steps <= 0:
            return f"step {trainer.global_step}, {_clock(seconds)}"
        left = seconds / done * (trainer.max_steps - trainer.global_step)
        return f"step {trainer.global_step}/{trainer.max_steps}, {_clock(seconds)}, {_clock(left)} left"

    def _tell(self, text: str) -> None:
        if self._enabled:
            print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
