"""Gather what the checks look at: both models as a run would have them, and completions of a few training prompts.

`auditing` calls `gather` once. Every check reads the `Evidence`, and exchanges parts of its step where it asks what
would happen with another teacher, student or estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning as L
from torch import nn

from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.data.prompts import pad_token_id
from lit_opd.data.stream import PromptLoader, PromptStream
from lit_opd.distiller import Distiller
from lit_opd.lab.audit.readings import Readings, read_tokens
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, Sampled
from lit_opd.runs.bench import set_up
from lit_opd.runs.prepare import prepare_data
from lit_opd.teachers import LocalScorer
from lit_opd.types import Author, PromptBatch, Rollout, SamplingLaw

__all__ = ["Evidence", "gather"]

# Fewer completions than this tell too little of an average; a training batch may have more.
_COMPLETIONS = 64


@dataclass(frozen=True)
class Evidence:
    """The step of a run, and one rollout of each model."""

    config: Config
    distiller: Distiller  # the step that training would make, with the weights that it begins from
    rollout: Rollout  # the student's completions under the training law; masked tokens do not count
    shown: Rollout  # the teacher's own completions of the same prompts
    arithmetic: Callable[[], AbstractContextManager[Any]]  # opens the precision that a training step runs in

    @property
    def student(self) -> LanguageModel:
        """The model that learns."""
        return self.distiller.student

    @property
    def teacher(self) -> LanguageModel:
        """The frozen model that scores."""
        scorer: Any = self.distiller.scorers["teacher"]
        return scorer.model

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that train."""
        return [p for p in self.student.model.parameters() if p.requires_grad]

    def but(self, **parts: Any) -> Evidence:
        """Make the same evidence with other parts of the step, by their names in `Distiller`."""
        return replace(self, distiller=replace(self.distiller, **parts))

    def taught_by(self, teacher: LanguageModel) -> Evidence:
        """Make the same evidence with another teacher."""
        scorer = LocalScorer(teacher, self.distiller.head_rows)
        return self.but(scorers={**self.distiller.scorers, "teacher": scorer})

    @cached_property
    def readings(self) -> Readings:
        """Both models at every token of the student's completions."""
        return self._read(self.student, self.rollout)

    @cached_property
    def shown_readings(self) -> Readings:
        """The teacher, in the student's place too, at every token of its own completions."""
        return self._read(self.teacher, self.shown)

    def _read(self, policy: LanguageModel, rollout: Rollout) -> Readings:
        step = self.distiller
        return read_tokens(policy, self.teacher, rollout, step.head_rows, self.student.stop_ids, step.merged)

    def token(self, index: int) -> str:
        """Quote a token as it stands in the vocabulary."""
        return repr(self.student.tokenizer.convert_ids_to_tokens(int(index)))


def gather(config: Config, rows: Sequence[int] | None = None) -> Evidence:
    """Load both models and let each complete the first training prompts, of all or of some rows."""
    L.seed_everything(config.seed, verbose=False)
    data = prepare_data(config, tell=False)  # the audit lists what there is to tell
    module, arithmetic = set_up(config, data)
    rows = range(len(data.train_prompts)) if rows is None else rows
    batch = data.transfer_batch_to_device(_first_prompts(config, data, rows), module.device, 0)
    count, length = config.rollout.num_completions, config.rollout.max_new_tokens
    # Of the student alone, whatever share of a training batch is its own.
    own = Sampled(module.engine, module.student, module.law, count, length, config.seed)
    shown = Sampled(LocalEngine(), module.teacher, SamplingLaw(), count, length, config.seed, Author.TEACHER)
    distiller = replace(module.distiller, source=own)
    with arithmetic():
        return Evidence(config, distiller, distiller.sample(batch), shown.complete(batch), arithmetic)


def _first_prompts(config: Config, data: PromptDataModule, rows: Sequence[int]) -> PromptBatch:
    """Take the first training batch of these rows, enlarged where it has few completions."""
    size, wanted = len(rows), -(-_COMPLETIONS // config.rollout.num_completions)
    stream = PromptStream(size, min(size, max(config.data.batch_size, wanted)), config.seed)
    picks = [(rows[place], draw) for place, draw in stream.batch(0)]
    return next(iter(PromptLoader(data.train_prompts, [picks], pad_token_id(data.tokenizer))))
