"""Signs that training goes wrong, seen while there is time to stop."""

from __future__ import annotations

import math
import warnings
from collections import deque
from statistics import fmean
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger

from lit_opd.config import CollapseConfig
from lit_opd.measures.steps import Seen
from lit_opd.module import DistillationModule

__all__ = ["CollapseWarning", "WatchCollapse"]


class CollapseWarning(UserWarning):
    """A sign that training goes wrong."""


class Sign(NamedTuple):
    """A number to watch.

    Attributes:
        key: of the configuration that holds its limit.
        says: what it is, with its unit.
        floor: whether it is bad below its limit, and not above.
        remedy: what to do.
    """

    key: str
    says: str
    floor: bool
    remedy: str

    def is_bad(self, value: float, limit: float) -> bool:
        """Whether the value is on the wrong side."""
        return value < limit if self.floor else value > limit


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

    Args:
        config: limits, window and action.
    """

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=config.window) for name in SIGNS}
        self._armed: set[str] = set()
        self._told: set[str] = set()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: DistillationModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at every sign."""
        logged = trainer.callback_metrics
        values = {name: float(logged[name]) for name in SIGNS if name in logged} | _support_mass(pl_module)
        for name, value in values.items():
            if math.isfinite(value):
                self._recent[name].append(value)
                self._judge(trainer, name)

    def _judge(self, trainer: L.Trainer, name: str) -> None:
        sign, recent = SIGNS[name], self._recent[name]
        mean, limit = fmean(recent), getattr(self.config, sign.key)
        if not sign.is_bad(mean, limit):
            self._armed.add(name)
        elif len(recent) == self.config.window and name in self._armed - self._told:
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
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger) and trainer.is_global_zero:
                logger.experiment.set_tag(logger.run_id, "collapse", told)
        trainer.should_stop = trainer.should_stop or stops

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "armed": sorted(self._armed), "told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._recent = {name: deque(v, maxlen=self.config.window) for name, v in state_dict["recent"].items()}
        self._armed, self._told = set(state_dict["armed"]), set(state_dict["told"])


def _support_mass(module: DistillationModule) -> dict[str, float]:
    """The mean over the student's tokens, over all processes, where the estimator compares a support."""
    parts = [part for part in map(_own_mass, module.seen) if part is not None]
    if not parts:
        return {}
    found = module.total({"sum": sum(total for total, _ in parts), "tokens": sum(count for _, count in parts)})
    return {"train/student_mass": found["sum"] / found["tokens"]} if found["tokens"] else {}


def _own_mass(seen: Seen) -> tuple[Any, Any] | None:
    rollout, stats = seen
    if "student_mass" not in stats:
        return None
    own_N = rollout.own_mask_BT[rollout.mask_BT]
    return stats["student_mass"][own_N].sum(), own_N.sum()
