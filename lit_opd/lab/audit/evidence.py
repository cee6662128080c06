"""What the checks look at: both models as a run would have them, and what they write after a few training prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.data.prompts import pad_token_id
from lit_opd.data.stream import PromptLoader, PromptStream
from lit_opd.distiller import Distiller
from lit_opd.estimators import BoundEstimator
from lit_opd.lab.audit.positions import Positions, read_positions
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, Sampled
from lit_opd.runs.distillation import build
from lit_opd.runs.lightning_trainer import build_evaluation_trainer
from lit_opd.teachers import LocalScorer
from lit_opd.types import Author, PromptBatch, Rollout, SamplingLaw

__all__ = ["Evidence", "gather"]

# Fewer completions than this tell too little of an average; a training batch may have more.
_COMPLETIONS = 64


@dataclass(frozen=True)
class Evidence:
    """Two models and two rollouts.

    Attributes:
        config: the run.
        distiller: the step that training would make, with the weights that it begins from.
        teacher: the frozen model that scores in it.
        rollout: the student's completions under the training law; masked tokens do not count.
        shown: the teacher's own completions of the same prompts.
        arithmetic: the precision that a training step runs in.
    """

    config: Config
    distiller: Distiller
    teacher: LanguageModel
    rollout: Rollout
    shown: Rollout
    arithmetic: Callable[[], AbstractContextManager[Any]]

    @property
    def estimator(self) -> BoundEstimator:
        """What the run names, bound."""
        return self.distiller.estimator

    @property
    def student(self) -> LanguageModel:
        """The model that learns."""
        return self.distiller.student

    @property
    def rows(self) -> int:
        """Positions a chunk of the head."""
        return self.distiller.head_rows

    def taught_by(self, teacher: LanguageModel) -> Evidence:
        """Make the same evidence with another teacher."""
        scorers = {**self.distiller.scorers, "teacher": LocalScorer(teacher, self.rows)}
        return replace(self, teacher=teacher, distiller=replace(self.distiller, scorers=scorers))

    def with_estimator(self, estimator: BoundEstimator) -> Evidence:
        """Make the same evidence with another estimator."""
        return replace(self, distiller=self.distiller.with_estimator(estimator))

    def with_student(self, student: LanguageModel) -> Evidence:
        """Make the same evidence with another student."""
        return replace(self, distiller=replace(self.distiller, student=student))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that train."""
        return [p for p in self.student.model.parameters() if p.requires_grad]

    @cached_property
    def positions(self) -> Positions:
        """Every token of the student's completions."""
        return read_positions(self.student, self.teacher, self.rollout, self.rows, self.student.stop_ids)

    @cached_property
    def shown_positions(self) -> Positions:
        """Every token of the teacher's own completions, with the teacher in the student's place too."""
        return read_positions(self.teacher, self.teacher, self.shown, self.rows, self.student.stop_ids)

    def token(self, index: int) -> str:
        """A token as it stands in the vocabulary, quoted."""
        return repr(self.student.tokenizer.convert_ids_to_tokens(int(index)))


def gather(config: Config) -> Evidence:
    """Load both models and let each complete the first training prompts.

    Args:
        config: the run.

    Raises:
        UserError: whatever cannot work.
    """
    trainer = build_evaluation_trainer(config)
    module, data = build(config)
    device, arithmetic = trainer.strategy.root_device, trainer.precision_plugin.forward_context
    trainer.precision_plugin.convert_module(module)
    module.to(device)
    batch = data.transfer_batch_to_device(_first_prompts(config, data), device, 0)
    count, length = config.rollout.num_completions, config.rollout.max_new_tokens
    # Of the student alone, whatever share of a training batch is its own.
    own = Sampled(module.engine, module.student, module.law, count, length, config.seed)
    distiller = replace(module.assemble(data.verifier), source=own)
    shown = Sampled(LocalEngine(), module.teacher, SamplingLaw(), count, length, config.seed, Author.TEACHER)
    with arithmetic():
        return Evidence(config, distiller, module.teacher, distiller.sample(batch), shown.complete(batch), arithmetic)


def _first_prompts(config: Config, data: PromptDataModule) -> PromptBatch:
    """The first training batch, enlarged where it has few completions."""
    size, wanted = len(data.train_prompts), -(-_COMPLETIONS // config.rollout.num_completions)
    stream = PromptStream(size, min(size, max(config.data.batch_size, wanted)), config.seed)
    return next(iter(PromptLoader(data.train_prompts, stream, pad_token_id(data.tokenizer))))
