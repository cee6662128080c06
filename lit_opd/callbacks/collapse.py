"""Watch for signs that training goes wrong, while there is time to stop.

Why here: an objective that collapses costs hours and a wasted run. Every trainer of `fit` has `WatchCollapse`, unless
`collapse.action` is `off`.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from statistics import fmean
from typing import Any, NamedTuple

import lightning as L

from lit_opd.config import CollapseConfig
from lit_opd.tracking import log_tag, logger_of

__all__ = ["CollapseWarning", "WatchCollapse"]


class CollapseWarning(UserWarning):
    """A sign that training goes wrong."""


class Sign(NamedTuple):
    """A number to watch."""

    key: str  # of the configuration that holds its limit
    says: str  # its meaning, with the unit
    floor: bool  # True where it is bad below its limit, False where above
    remedy: str


SIGNS = {
    "train/entropy": Sign(
        "min_entropy", "the student's entropy (nats/token)", True,
        "It samples nearly the same every time: lower optim.lr, or mix in a forward KL.",
    ),
    "rollout/repetition_frac": Sign(
        "max_repetition", "the share of repeated 4-grams", False,
        "Completions run in loops: see the completions table, lower optim.lr, or shorten rollout.max_new_tokens.",
    ),
    "rollout/truncated_frac": Sign(
        "max_truncated", "the share of completions cut at rollout.max_new_tokens", False,
        "They no longer end: run `audit`, which compares how the two models end, or raise rollout.max_new_tokens.",
    ),
    "train/student_mass": Sign(
        "min_support_mass", "the student's mass on the tokens that the estimator compares", True,
        "The objective is blind to what left: raise the support's k, or use head_and_tail or full_vocab.",
    ),
}  # fmt: skip


class WatchCollapse(L.Callback):
    """Warns, or stops after the step, when a sign that was on its good side has crossed its limit.

    Each is the mean of the last steps in which the student wrote something to read it from. What begins on the wrong
    side is how the run is made and no collapse, so a sign counts from the first time it is good; it is told once, and
    the MLflow run gets the tag `collapse`.

    Attributes:
        stopped: it has asked the trainer to stop.
    """

    def __init__(self, config: CollapseConfig, updates_per_rollout: int = 1) -> None:
        self.config = config
        self.window = math.ceil(config.window / updates_per_rollout)  # batches, each of which has one number
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=self.window) for name in SIGNS}
        self._armed: set[str] = set()
        self._told: set[str] = set()
        self.stopped = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Look at every sign."""
        logged = trainer.callback_metrics
        for name in SIGNS:
            if name in logged and math.isfinite(logged[name]):
                self._recent[name].append(float(logged[name]))
                self._judge(trainer, name)

    def _judge(self, trainer: L.Trainer, name: str) -> None:
        sign, recent = SIGNS[name], self._recent[name]
        mean, limit = fmean(recent), getattr(self.config, sign.key)
        is_bad = mean < limit if sign.floor else mean > limit
        if not is_bad:
            self._armed.add(name)
        elif len(recent) == self.window and name in self._armed - self._told:
            self._told.add(name)
            self._tell(trainer, name, mean, limit)

    def _tell(self, trainer: L.Trainer, name: str, mean: float, limit: float) -> None:
        sign, stops = SIGNS[name], self.config.action == "stop"
        side = "fell below" if sign.floor else "rose above"
        where = f"collapse.{sign.key}={limit:g}"
        told = f"step {trainer.global_step}: {name}, {sign.says}, {side} {where}: {mean:.3g} in the last steps"
        if trainer.is_global_zero:
            end = "The run stops here." if stops else "Set collapse.action=stop to end the run at that."
            warnings.warn(f"{told}. {sign.remedy} {end}", CollapseWarning, stacklevel=2)
        log_tag(logger_of(trainer), "collapse", told)
        self.stopped = self.stopped or stops
        trainer.should_stop = trainer.should_stop or stops

    def state_dict(self) -> dict[str, Any]:
        """Give a checkpoint what was seen so far."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "armed": sorted(self._armed), "told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._recent = {name: deque(v, maxlen=self.window) for name, v in state_dict["recent"].items()}
        self._armed, self._told = set(state_dict["armed"]), set(state_dict["told"])
