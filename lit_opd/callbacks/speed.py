"""Add up what the steps of a run cost.

Why here: a comparison at equal cost needs costs beside the yardsticks. Every trainer of `fit` has it.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import lightning as L

from lit_opd.tracking import log_metrics

__all__ = ["StepSpeed"]

PEAK, SECONDS, SPEED = "perf/peak_memory_mb", "perf/step_s", "perf/tokens_per_s"


class StepSpeed(L.Callback):
    """Keeps what every step logs as `perf/*`, and logs at evaluations what all steps so far took together.

    `cost/tokens` are the completion tokens sampled for training, `cost/seconds` those spent in training steps. They are
    exact whatever `log_every_n_steps`, go on where a run is resumed, and lie on the steps of `val/*`, so that a chart
    can have them as its axis.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}
        self._before: dict[str, float] = {}
        self.cost = {"cost/tokens": 0.0, "cost/seconds": 0.0}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep the numbers of the step."""
        step = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("perf/")}
        for name, value in step.items():
            self.steps.setdefault(name, []).append(value)
        self.cost["cost/seconds"] += step[SECONDS]
        self.cost["cost/tokens"] += round(step[SPEED] * step[SECONDS])

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the totals, as often as `val/*`: MLflow's charts pair the values of two metrics by their number."""
        if not trainer.sanity_checking and pl_module.judged == "student":
            log_metrics(trainer, {name: round(value, 3) for name, value in self.cost.items()}, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Give a checkpoint the totals, which a resumed run adds to, and what `typical` says."""
        return self.cost | {"typical": self.typical()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's totals."""
        self._before = state_dict.get("typical", {})  # which an earlier version did not keep
        self.cost.update({name: state_dict[name] for name in self.cost})

    def typical(self) -> dict[str, float]:
        """Take the median over steps, which a slow first one does not move, and the largest of the peak memory.

        Where a resumed run had no step left to make, they are those of the process before it.
        """
        if not self.steps:
            return self._before
        return {name: max(values) if name == PEAK else median(values) for name, values in self.steps.items()}
