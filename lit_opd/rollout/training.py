"""Completions to train on: the student's own, and demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_opd.config import RolloutConfig
from lit_opd.models import LanguageModel
from lit_opd.rollout.batching import TRAINING_STREAM, uniforms
from lit_opd.rollout.demonstrations import complete, student_writes, written
from lit_opd.rollout.engine import RolloutEngine
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["TrainingSampler"]


@dataclass(frozen=True)
class TrainingSampler:
    """Completes training prompts: a share of them by the student, the others by the teacher or from the data.

    Attributes:
        config: how many completions, how long, which share.
        law: what the student samples under; the teacher's completions are its own distribution.
        seed: of everything that is sampled.
    """

    config: RolloutConfig
    law: SamplingLaw
    seed: int

    def complete(
        self,
        engine: RolloutEngine,
        batch: PromptBatch,
        student: LanguageModel,
        teacher: LanguageModel,
        texts_of: Callable[[Sequence[Any]], list[str]],
    ) -> Rollout:
        """Completions of every prompt.

        Args:
            engine: samples.
            batch: prompts.
            student: completes `student_share` of them.
            teacher: completes the others where `demonstrations` is `teacher`.
            texts_of: the completions that the data holds for rows, where it is `data`.
        """

        def sample(prompts: PromptBatch, policy: LanguageModel = student, law: SamplingLaw = self.law) -> Rollout:
            count, length = self.config.num_completions, self.config.max_new_tokens
            numbers_BT = uniforms((self.seed, TRAINING_STREAM), prompts.draws, count, length)
            return engine.sample(policy, prompts, law, count, numbers_BT.to(prompts.prompt_ids_BP.device))

        def demonstrate(prompts: PromptBatch) -> Rollout:
            if self.config.demonstrations == "teacher":
                return sample(prompts, teacher, SamplingLaw())
            return written(
                student, prompts, texts_of(prompts.rows), self.config.num_completions, self.config.max_new_tokens
            )

        return complete(batch, student_writes(self.seed, batch.draws, self.config.student_share), sample, demonstrate)
