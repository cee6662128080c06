"""What the checks look at: both models as a run would have them, and what they write after a few training prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.data.prompts import pad_token_id
from lit_opd.data.stream import PromptLoader, PromptStream
from lit_opd.estimators import BoundEstimator
from lit_opd.evaluation import judge
from lit_opd.functional import chunk_rows
from lit_opd.lab.audit.positions import Positions, read_positions
from lit_opd.models import LanguageModel
from lit_opd.module import DistillationModule
from lit_opd.rollout import TRAINING_STREAM, LocalEngine, uniforms
from lit_opd.runs.distillation import build
from lit_opd.runs.lightning_trainer import build_evaluation_trainer
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["Evidence", "gather"]

# Fewer completions than this tell too little of an average; a training batch may have more.
_COMPLETIONS = 64


@dataclass(frozen=True)
class Evidence:
    """Two models and two rollouts.

    Attributes:
        config: the run.
        estimator: what it names, bound.
        student: with the weights that training begins from.
        teacher: frozen.
        reference: where the estimator asks for one.
        rollout: the student's completions under the training law; masked tokens do not count.
        shown: the teacher's own completions of the same prompts.
        rewards_B: of the student's completions, where the estimator asks for them.
        rows: positions a chunk of the head.
        arithmetic: the precision that a training step runs in.
    """

    config: Config
    estimator: BoundEstimator
    student: LanguageModel
    teacher: LanguageModel
    reference: LanguageModel | None
    rollout: Rollout
    shown: Rollout
    rewards_B: Tensor | None
    rows: int
    arithmetic: Callable[[], AbstractContextManager[Any]]

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
    student, teacher = module.student, module.pair.load("teacher", device)
    wants_reference = "reference" in module.estimator.needs
    batch = data.transfer_batch_to_device(_first_prompts(config, data), device, 0)
    with arithmetic():
        rollout = _complete(config, module, batch)
        shown = LocalEngine().sample(teacher, batch, SamplingLaw(), config.rollout.num_completions,
                                     _numbers(config, batch))  # fmt: skip
    wants_rewards = data.verifier is not None and "rewards" in module.estimator.needs
    return Evidence(
        config, module.estimator, student, teacher,
        reference=module.pair.load("reference", device) if wants_reference else None,
        rollout=rollout,
        shown=shown,
        rewards_B=judge(student, batch, rollout, data.verifier) if wants_rewards else None,
        rows=chunk_rows(module.pair.vocabulary, config.optim.head_chunk_mib, device),
        arithmetic=arithmetic,
    )  # fmt: skip


def _first_prompts(config: Config, data: PromptDataModule) -> PromptBatch:
    """The first training batch, enlarged where it has few completions."""
    size, wanted = len(data.train_prompts), -(-_COMPLETIONS // config.rollout.num_completions)
    stream = PromptStream(size, min(size, max(config.data.batch_size, wanted)), config.seed)
    return next(iter(PromptLoader(data.train_prompts, stream, pad_token_id(data.tokenizer))))


def _complete(config: Config, module: DistillationModule, batch: PromptBatch) -> Rollout:
    rollout = module.engine.sample(module.student, batch, module.sampler.law, config.rollout.num_completions,
                                   _numbers(config, batch))  # fmt: skip
    masked = rollout.completion_ids_BT.new_tensor(module.masked_ids)
    return rollout.uncount(torch.isin(rollout.completion_ids_BT, masked))


def _numbers(config: Config, batch: PromptBatch) -> Tensor:
    count, length = config.rollout.num_completions, config.rollout.max_new_tokens
    return uniforms((config.seed, TRAINING_STREAM), batch.draws, count, length).to(batch.prompt_ids_BP.device)
