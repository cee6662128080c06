"""Move the weights of several teachers while training goes on.

The module calls `scheduled` for every batch, and its checks before the first. Only the share of training that is done
counts, so that a resumed run goes on with the weights that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lit_opd.config import check_schedule
from lit_opd.data.datamodule import PromptDataModule
from lit_opd.errors import UserError
from lit_opd.types import PromptBatch

__all__ = ["Schedule", "check_data", "check_run", "read_schedule", "scheduled"]

KEY = "teachers_schedule"
# By the name of every teacher, in the order of the weights, their factor before training and at its end.
Schedule = Mapping[str, Sequence[float]]


def read_schedule(given: Mapping[str, Any], teachers: Iterable[str]) -> Schedule:
    """Write out the factors of every teacher.

    They are 1 for teachers that are not named. Without any name there is no schedule.

    Raises:
        UserError: a name that is no teacher's, or other values than two factors.
    """
    names = [*teachers]
    check_schedule(given, names)
    return {name: [float(factor) for factor in given.get(name, (1, 1))] for name in names} if given else {}


def scheduled(batch: PromptBatch, schedule: Schedule, progress: float) -> PromptBatch:
    """Multiply the weights of a batch by their factors, and divide those of every row by their sum.

    Factors move in a straight line. A row of one teacher stays its own, whatever the factor.

    Args:
        batch: with the weights that the data gives.
        schedule: of the factors; without any the batch stays as it is.
        progress: the share of training that is done, 0 to 1.
    """
    if not schedule or batch.routes_BM is None:
        return batch
    first_M, last_M = batch.routes_BM.new_tensor([*schedule.values()]).unbind(1)
    moved_BM = batch.routes_BM * first_M.lerp(last_M, progress)
    return batch._replace(routes_BM=moved_BM / moved_BM.sum(1, keepdim=True))


def check_data(schedule: Schedule, data: Any) -> None:
    """Refuse rows of a data module whose teachers all have the factor 0, before training or at its end.

    A row that has a teacher at both ends has one all along, for factors move in straight lines.

    Raises:
        UserError: naming the first such row.
    """
    ends = zip(*schedule.values(), strict=True) if isinstance(data, PromptDataModule) else ()
    for end, factors in zip(("before training", "at its end"), ends, strict=False):
        for prompts in (data.train_prompts, data.validation_prompts):
            routes_RM = torch.tensor(prompts.routes or [], dtype=torch.float32)
            bare_R = (routes_RM @ torch.tensor(factors) == 0) if len(routes_RM) else routes_RM
            if bare_R.any():
                found = f"0 {end} for all those of {prompts.rows[int(bare_R.nonzero()[0, 0])]}"[:160]
                raise UserError(KEY, "a factor above 0 for a teacher of every row", found, "Raise it, if to 0.001.")


def check_run(schedule: Schedule, trainer: Any, stage: str) -> None:
    """Refuse a schedule that does not fit the data of a trainer, or that is to be followed for nobody knows how long.

    Raises:
        UserError: as of `check_data`; training in which neither steps nor epochs are limited.
    """
    check_data(schedule, getattr(trainer, "datamodule", None))
    if stage == "fit" and schedule and trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        expected = f"a number of steps, over which {KEY} moves the weights"
        raise UserError("trainer.max_steps", expected, "none", "Set it, or trainer.max_epochs.")
