"""Sources of completions to train on: sampled by a model, written in the data, or a mixture of two sources.

A source hides from the rest of a training step where completions come from. `build_source` makes the one that a
configuration describes; `Distiller.sample` asks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_opd.config import RolloutConfig
from lit_opd.models import LanguageModel
from lit_opd.rollout.batching import TRAINING_STREAM, uniforms
from lit_opd.rollout.engine import RolloutEngine
from lit_opd.types import Author, PromptBatch, Prompts, Rollout, SamplingLaw

__all__ = ["Mixed", "RolloutSource", "Sampled", "TextsOf", "Written", "build_source", "student_writes"]

# The second number of a seed, which keeps the draws of who writes apart from those of the tokens.
_WHO_WRITES = 2

TextsOf = Callable[[Sequence[Mapping[str, Any]]], tuple[list[str], int]]
"""Looks up a completion for every row, and the token that ends them all."""


class RolloutSource(Protocol):
    """A source of completions."""

    def complete(self, batch: PromptBatch) -> Rollout:
        """Complete every prompt, with the completions of one prompt next to each other."""
        ...


@dataclass(frozen=True)
class Sampled:
    """Completions that a model samples: `count` a prompt, of at most `length` tokens, in the role of `author`."""

    engine: RolloutEngine
    policy: LanguageModel
    law: SamplingLaw
    count: int
    length: int
    seed: int
    author: Author = Author.STUDENT

    def complete(self, batch: PromptBatch) -> Rollout:
        """Sample every prompt's completions, by random numbers that follow from the prompt's place in the run."""
        numbers_BT = uniforms((self.seed, TRAINING_STREAM), batch.draws, self.count, self.length)
        device = batch.prompts.ids_BP.device
        rollout = self.engine.sample(self.policy, batch, self.law, self.count, numbers_BT.to(device))
        if self.author == Author.STUDENT:
            return rollout
        # Engines mark tokens that their policy samples as the student's. Tokens marked otherwise keep their author.
        return replace(rollout, author_BT=rollout.author_BT.masked_fill(rollout.student_wrote_BT, self.author))


@dataclass(frozen=True)
class Written:
    """Completions that the data holds, with their end, cut to `length`, repeated `count` times.

    No model sampled them, so their `sampler_logps_BT` are 0. The tokenizer is that of `policy`.
    """

    policy: LanguageModel
    texts_of: TextsOf
    count: int
    length: int

    def complete(self, batch: PromptBatch) -> Rollout:
        """Look up every prompt's completion."""
        policy, device = self.policy, batch.prompts.ids_BP.device
        texts, end = self.texts_of(batch.rows)
        tokens = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = [[*row, *([end] if row[-1:] != [end] else [])][: self.length] for row in tokens]
        width = max(map(len, ids))
        padded = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in ids], device=device)
        real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids], device=device)
        stopped = torch.tensor([row[-1] == end for row in ids], device=device)
        ids_BT, real_BT, stopped_B = (x.repeat_interleave(self.count, dim=0) for x in (padded, real, stopped))
        logps_BT = torch.zeros(ids_BT.shape, dtype=torch.float32, device=device)
        return Rollout.completed(batch, self.count, ids_BT, real_BT, logps_BT, stopped_B, SamplingLaw(), Author.DATA)


@dataclass(frozen=True)
class Mixed:
    """Prompts completed by the student's `own` source, whose law the rollout has, or by `others`, demonstrations.

    `share` is the probability that the student completes a prompt (lambda of GKD, arXiv:2306.13649). It is 0 before the
    batch `start` of the run (off-policy, then on-policy: Qwen3, arXiv:2505.09388).
    """

    own: RolloutSource
    others: RolloutSource
    share: float
    seed: int
    start: int = 0

    def complete(self, batch: PromptBatch) -> Rollout:
        """Complete every prompt by the source that its draw names."""
        if batch.batch < self.start:
            return self.others.complete(batch)
        writes = student_writes(self.seed, batch.draws, self.share)
        if writes.all():
            return self.own.complete(batch)
        if not writes.any():
            return self.others.complete(batch)
        parts = []
        for source, chosen in ((self.own, writes), (self.others, ~writes)):
            places = torch.nonzero(chosen).flatten()
            part = source.complete(batch.take(places))
            index_B = places.to(part.prompt_index_B.device)[part.prompt_index_B]
            parts.append(replace(part, prompt_index_B=index_B))
        order = torch.argsort(torch.cat([part.prompt_index_B for part in parts]), stable=True)
        return _joined(parts, order)


def _joined(parts: Sequence[Rollout], order: Tensor) -> Rollout:
    """Join rollouts of one batch, under the law of the first, with their rows in an order."""
    width = max(part.ids_BT.shape[1] for part in parts)

    def join(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        if name.endswith("_BT"):
            values = [pad(value, (0, width - value.shape[1])) for value in values]
        return torch.cat(values)[order]

    first = parts[0]
    named: dict[str, Any] = {f.name: join(f.name) for f in fields(first) if isinstance(getattr(first, f.name), Tensor)}
    prompts, *shown = (
        Prompts(*(torch.cat(columns)[order] for columns in zip(*versions, strict=True)))
        for versions in zip(*((part.prompts, *part.shown.values()) for part in parts), strict=True)
    )
    return replace(first, prompts=prompts, shown=dict(zip(first.shown, shown, strict=True)), **named)


def student_writes(seed: int, draws: Sequence[tuple[int, int]], share: float) -> Tensor:
    """Draw which prompts the student completes itself, [prompts], each with probability `share` by its own draw."""
    numbers = [np.random.default_rng([seed, _WHO_WRITES, *draw]).random() for draw in draws]
    return torch.tensor(numbers, dtype=torch.float64) < share


def build_source(
    config: RolloutConfig,
    law: SamplingLaw,
    seed: int,
    engine: RolloutEngine,
    student: LanguageModel,
    teacher: LanguageModel | None,
    texts_of: TextsOf,
) -> RolloutSource:
    """Make the configured source, in which a teacher that can sample writes at temperature 1, untruncated."""
    count, length = config.num_completions, config.max_new_tokens
    own = Sampled(engine, student, law, count, length, seed)
    if not config.demonstrated:
        return own
    others: RolloutSource
    if config.demonstrations == "data":
        others = Written(student, texts_of, count, length)
    else:
        assert teacher is not None
        others = Sampled(engine, teacher, SamplingLaw(), count, length, seed, Author.TEACHER)
    return Mixed(own, others, config.student_share, seed, config.student_from)
