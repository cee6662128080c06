"""Name the random numbers of a rollout, and cut its rows into updates and micro-batches.

Numbers and updates follow from a prompt's place in the whole batch, so that a run draws and learns the same whatever
the number of processes. Sources and evaluations draw here, `Distiller` and the training module cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.types import PromptBatch, Rollout

__all__ = ["EVALUATION_STREAM", "TRAINING_STREAM", "check_batch", "micro_batches", "split_updates", "uniforms"]

TRAINING_STREAM = 0
"""Second number of a seed in training, which keeps its draws apart from those of evaluations."""
EVALUATION_STREAM = 1
"""Second number of a seed in evaluations."""


def check_batch(batch: object) -> None:
    """Refuse what a loader of another kind gives, before anything reads it.

    Raises:
        UserError: it is no `PromptBatch`.
    """
    if not isinstance(batch, PromptBatch):
        remedy = "Give the trainer a PromptDataModule(train_rows=...), or a loader of such batches."
        raise UserError("data", "batches of the type lit_opd.types.PromptBatch", type(batch).__name__, remedy)


def uniforms(seed: Sequence[int], draws: Sequence[tuple[int, int]], num_completions: int, length: int) -> Tensor:
    """Draw the random numbers of a rollout, one stream for each completion, named by (seed, draw, completion).

    `seed` holds a second number that sets training apart from evaluation, `draws` is `PromptBatch.draws`.

    Returns:
        [B, T] float64 in [0, 1), on the CPU; completions of one prompt are neighbours.
    """
    rows = [
        np.random.default_rng([*seed, *draw, completion]).random(length)
        for draw in draws
        for completion in range(num_completions)
    ]
    return torch.from_numpy(np.stack(rows))


def split_updates(
    places: Sequence[int], num_completions: int, updates: int, prompts: int, whole_prompts: bool = False
) -> list[Tensor]:
    """Choose the rows of each optimizer update, by cutting the batch of all processes into equal parts in order.

    `places` are those of this process's prompts among the `prompts` of the whole batch. With `whole_prompts` all
    completions of a prompt stay in one update.

    Returns:
        `updates` index tensors, some perhaps empty; together they hold every row of this process once.
    """
    numbers = [place * num_completions + completion for place in places for completion in range(num_completions)]
    unit = num_completions if whole_prompts else 1
    update_B = torch.tensor(numbers) // unit * updates // (prompts * num_completions // unit)
    return [torch.nonzero(update_B == update).flatten() for update in range(updates)]


def micro_batches(rollout: Rollout, index: Tensor, budget: int, whole_prompts: bool = False) -> list[Tensor]:
    """Choose the rows of each micro-batch: rows of similar length and of the same teachers, at most `budget` tokens.

    Args:
        rollout: all rows.
        index: the rows to use.
        budget: rows x (longest prompt + longest completion), which counts padding, that a micro-batch may hold. A row,
            or a prompt's rows, above it is a micro-batch by itself.
        whole_prompts: keep the chosen completions of a prompt together.

    Returns:
        Index tensors, for each group of teachers shortest rows first; together they hold every chosen row once.
    """
    parts = rollout.by_teachers(index)
    return [batch for part in parts for batch in _by_length(rollout, part, budget, whole_prompts)]


def _by_length(rollout: Rollout, index: Tensor, budget: int, whole_prompts: bool) -> list[Tensor]:
    prompts, completions = rollout.prompts.mask_BP.sum(1).tolist(), rollout.real_BT.sum(1).tolist()
    unit_of = rollout.prompt_index_B.tolist() if whole_prompts else range(len(rollout))
    units: dict[int, list[int]] = {}
    for row in index.tolist():
        units.setdefault(unit_of[row], []).append(row)
    groups: list[list[int]] = []
    for unit in sorted(units.values(), key=lambda rows: max(prompts[row] + completions[row] for row in rows)):
        rows = [*groups[-1], *unit] if groups else unit
        width = max(prompts[row] for row in rows) + max(completions[row] for row in rows)
        if groups and width * len(rows) <= budget:
            groups[-1] = rows
        else:
            groups.append(unit)
    return [torch.tensor(group, device=rollout.mask_BT.device) for group in groups]
