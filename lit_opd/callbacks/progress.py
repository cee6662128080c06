"""Show one bar over the optimizer steps of the run, with the numbers to watch.

Why here: Lightning's own bars count batches of an epoch. Every trainer of the commands has this one instead on a
terminal, and `StepLines` elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from lit_opd.measures.table import describe

__all__ = ["StepProgress", "numbers_to_watch"]

SHOWN = ("train/reverse_kl", "val/reverse_kl", "val/accuracy", "rollout/length", "perf/tokens_per_s")


class StepProgress(ProgressBar):
    """Steps done, time left, reverse KL, held-out results, length and speed, with a passing bar for evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None
        self._evaluation: Any = None

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step the run begins with."""
        total, begun = trainer.max_steps if trainer.max_steps > 0 else None, trainer.global_step
        own = {"unit": "step", "disable": not self._enabled, "mininterval": 0.5}
        self._bar = tqdm(desc="distil", total=total, initial=begun, **own)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance to the present step."""
        self._bar.set_postfix(numbers_to_watch(trainer), refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bars, so that what is printed next begins on a line of its own."""
        for bar in (self._evaluation, self._bar):
            if bar is not None:
                bar.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open a bar that vanishes when the evaluation is done."""
        batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        total = sum(n for n in batches if isinstance(n, int))
        name = f"measure the {pl_module.judged}"
        self._evaluation = tqdm(desc=name, total=total, unit="batch", leave=False, disable=not self._enabled)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance."""
        self._evaluation.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the evaluation's bar."""
        self._evaluation.close()

    # `test` measures like `validate`.
    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]


def numbers_to_watch(trainer: L.Trainer) -> dict[str, str]:
    """Read what is known of the run by now, by what it is called where there is little room."""
    metrics = trainer.callback_metrics
    known = {_label(name): float(metrics[name]) for name in SHOWN if name in metrics}
    return {label: f"{value:.3g}" for label, value in known.items() if not math.isnan(value)}


def _label(name: str) -> str:
    return f"{'val ' if name.startswith('val/') else ''}{describe(name).label}"
