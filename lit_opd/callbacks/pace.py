"""Count evaluations, checkpoints and points of curves in optimizer steps, where Lightning counts batches.

Why here: with `optim.updates_per_rollout` above 1 a batch is several steps, and every key of the configuration that
says "steps" means the optimizer's. Every trainer of `fit` has it.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L

from lit_opd.module import DistillationModule
from lit_opd.tracking import log_metrics

__all__ = ["KeepPace", "is_due"]

NEVER = sys.maxsize  # batches


def is_due(module: DistillationModule, step: int, every: int) -> bool:
    """Find out whether the batch that ended with an optimizer step reached or crossed a multiple of `every`."""
    return step // every > (step - module.optim_config.updates_per_rollout) // every


class KeepPace(L.Callback):
    """Has Lightning evaluate, and log a batch, at the first end of a batch where so many optimizer steps are full.

    It also logs the learning rate of a batch, at the steps done before it. How often to log is `log_every_n_steps` of
    the trainer.
    """

    def __init__(self, evaluate_every: int) -> None:
        self.evaluate_every = evaluate_every
        self.log_every = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:  # type: ignore[override]
        """Say whether an evaluation belongs to the step that a resumed run goes on from."""
        if self.log_every < 0:  # not at a second `fit`, for which it says what was set here
            self.log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._say(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: DistillationModule, *_: Any) -> None:  # type: ignore[override]
        """Say whether the batch is to be logged, and log its learning rate."""
        after = trainer.global_step + pl_module.optim_config.updates_per_rollout
        logs = self.log_every > 0 and is_due(pl_module, after, self.log_every)
        trainer.log_every_n_steps = int(logs)  # type: ignore[attr-defined]
        if logs:
            rates = {f"lr-{type(o).__name__}": float(o.param_groups[0]["lr"]) for o in trainer.optimizers}
            log_metrics(trainer, rates, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DistillationModule, *_: Any) -> None:  # type: ignore[override]
        """Say whether an evaluation comes next."""
        self._say(trainer, pl_module)

    def _say(self, trainer: L.Trainer, module: DistillationModule) -> None:
        due = is_due(module, trainer.global_step, self.evaluate_every)
        trainer.val_check_batch = 1 if due else NEVER
