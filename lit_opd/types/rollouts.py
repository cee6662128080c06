"""Hold prompts, and the completions of a rollout with the law that sampled them.

Made by data and rollout sources, read by every room above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Author", "Ended", "FinishReason", "PromptBatch", "Prompts", "Rollout", "SamplingLaw"]

Ended = Callable[["PromptBatch", int, list[int]], None]
"""Hears of a completion that has ended: the batch, the number of its prompt there, and its tokens with their end."""


class Author(IntEnum):
    """The writer of a token."""

    STUDENT = 0
    TEACHER = 1
    DATA = 2
    ENVIRONMENT = 3


class Prompts(NamedTuple):
    """Prompt tokens, padded on the left.

    Attributes:
        ids_BP: the tokens.
        mask_BP: True at real tokens.
    """

    ids_BP: Tensor
    mask_BP: Tensor

    def rows(self, index: Tensor) -> Prompts:
        """Choose prompts, without the padding that none of them needs."""
        ids_BP, mask_BP = self.ids_BP[index], self.mask_BP[index]
        start = mask_BP.shape[1] - (int(mask_BP.sum(1).amax()) if len(mask_BP) else 0)
        return Prompts(ids_BP[:, start:], mask_BP[:, start:])


class PromptBatch(NamedTuple):
    """Prompts to complete.

    Attributes:
        prompts: what the student reads.
        rows: the data set's row of each prompt (its answer and whatever a verifier wants).
        batch: number of the batch in the whole run.
        places: place of each prompt in the batch of all processes. Batch and place name a prompt's random draws, so
            that what is sampled for it depends neither on its neighbours nor on the number of processes.
        shown: by the name of a scorer, the prompts that it reads instead.
        routes_BM: the weight of each of M teachers for each prompt, rows of sum 1; None where there is one teacher.
        ended: what an engine may call, from any thread, with a completion that ended before the others; None where
            nobody begins to work on single completions.
    """

    prompts: Prompts
    rows: list[Mapping[str, Any]]
    batch: int
    places: list[int]
    shown: Mapping[str, Prompts] = {}
    routes_BM: Tensor | None = None
    ended: Ended | None = None

    @property
    def draws(self) -> list[tuple[int, int]]:
        """The two integers that name the random draws of each prompt."""
        return [(self.batch, place) for place in self.places]

    def take(self, index: Tensor) -> PromptBatch:
        """Choose prompts, padded as they are."""
        chosen = index.tolist()
        prompts, *shown = (Prompts(p.ids_BP[index], p.mask_BP[index]) for p in (self.prompts, *self.shown.values()))
        rows, places = [self.rows[i] for i in chosen], [self.places[i] for i in chosen]
        routes_BM = None if self.routes_BM is None else self.routes_BM[index]
        return self._replace(
            prompts=prompts, rows=rows, places=places, shown=dict(zip(self.shown, shown, strict=True)),
            routes_BM=routes_BM,
        )  # fmt: skip


@dataclass(frozen=True)
class SamplingLaw:
    """The law that turns a model's logits into the distribution tokens are drawn from.

    Logits are divided by `temperature`; then only the `top_k` largest are kept (0: all), then the smallest
    set of largest-first tokens whose mass reaches `top_p` (1: all), then tokens with at least `min_p` times
    the largest probability (0: all); what is left is renormalised. `min_new_tokens` forbids the stop tokens at the
    first that many completion positions.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0

    @property
    def truncates(self) -> bool:
        """True where tokens are cut off by their probability or their rank."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_student(self) -> bool:
        """True where the sampler is the student's own distribution: temperature 1 and nothing cut off."""
        return self == SamplingLaw()


class FinishReason(IntEnum):
    """Why a completion ended."""

    STOP = 0
    LENGTH = 1


@dataclass(frozen=True, eq=False)
class Rollout:
    """Completions, who wrote them, and the law that sampled them.

    Attributes:
        prompts: the prompt of each row.
        ids_BT: completion tokens, padded on the right.
        real_BT: True at real completion tokens; the stop token is one of them.
        mask_BT: True at counted tokens. Tokens that are not to be learnt from are in the sequence and out of this mask.
        author_BT: `Author` of each token.
        sampler_logps_BT: log-probability of each token *under the law that sampled it* (nats, fp32), 0 elsewhere.
        finish_B: `FinishReason` of each row.
        law: the sampling law.
        prompt_index_B: which prompt of the batch each row completes.
        rewards_B: the verifier's, where one was asked.
        shown: by the name of a scorer, the prompts that it reads instead.
        routes_BM: the weight of each of M teachers for each row, of sum 1; None where there is one teacher.
    """

    prompts: Prompts
    ids_BT: Tensor
    real_BT: Tensor
    mask_BT: Tensor
    author_BT: Tensor
    sampler_logps_BT: Tensor
    finish_B: Tensor
    law: SamplingLaw
    prompt_index_B: Tensor
    rewards_B: Tensor | None = None
    shown: Mapping[str, Prompts] = field(default_factory=dict)
    routes_BM: Tensor | None = None

    @classmethod
    def completed(
        cls, batch: PromptBatch, count: int, ids_BT: Tensor, real_BT: Tensor, logps_BT: Tensor, stopped_B: Tensor,
        law: SamplingLaw, author: Author = Author.STUDENT,
    ) -> Rollout:  # fmt: skip
        """Make a rollout of completions in the order of their prompts, `count` for each, all of one author.

        All real tokens count. Log-probabilities are under the law, 0 elsewhere; a stop token ended rows in `stopped_B`.
        """
        rows_B = torch.arange(len(batch.rows), device=ids_BT.device).repeat_interleave(count)
        prompts, *shown = (Prompts(p.ids_BP[rows_B], p.mask_BP[rows_B]) for p in (batch.prompts, *batch.shown.values()))
        return cls(
            prompts, ids_BT, real_BT, mask_BT=real_BT,
            author_BT=torch.full_like(ids_BT, author, dtype=torch.int8),
            sampler_logps_BT=logps_BT,
            finish_B=torch.where(stopped_B, FinishReason.STOP, FinishReason.LENGTH),
            law=law, prompt_index_B=rows_B, shown=dict(zip(batch.shown, shown, strict=True)),
            routes_BM=None if batch.routes_BM is None else batch.routes_BM[rows_B],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids_BT)

    @property
    def student_wrote_BT(self) -> Tensor:
        """True at tokens that the student sampled."""
        return self.author_BT == Author.STUDENT

    @property
    def own_mask_BT(self) -> Tensor:
        """True at counted tokens that the student sampled."""
        return self.mask_BT & self.student_wrote_BT

    @cached_property
    def counted_N(self) -> Tensor:
        """Places of the counted tokens among all B x T, in order.

        An accelerator makes the host wait for their number: once, for a mask that chooses them waits every time.
        """
        return self.mask_BT.flatten().nonzero().flatten()

    @cached_property
    def has_demonstrations(self) -> bool:
        """True where another than the student wrote a counted token. An accelerator makes the host wait, once."""
        return bool((self.mask_BT & ~self.student_wrote_BT).any())

    def count(self) -> None:
        """Find out now what of it an accelerator makes the host wait for."""
        _ = self.counted_N, self.has_demonstrations

    def counted(self, values_BT: Tensor) -> Tensor:
        """Choose the values of the counted tokens, [N]."""
        return values_BT.take(self.counted_N)

    def spread(self, values_N: Tensor, elsewhere_BT: Tensor) -> Tensor:
        """Put values of the counted tokens into their places, [B, T], with what is given `elsewhere`."""
        return elsewhere_BT.flatten().index_copy(0, self.counted_N, values_N).view_as(elsewhere_BT)

    def uncount(self, positions_BT: Tensor) -> Rollout:
        """Leave the chosen positions out of the count."""
        return replace(self, mask_BT=self.mask_BT & ~positions_BT)

    def seen_by(self, scorer: str) -> Rollout:
        """Put the same completions after the prompts that a scorer reads."""
        return replace(self, prompts=self.shown[scorer]) if scorer in self.shown else self

    def by_teachers(self, index: Tensor) -> list[Tensor]:
        """Part rows, a tensor of their numbers, by the teachers that have a weight, each part in the order of rows."""
        if self.routes_BM is None:
            return [index]
        kind_B = (self.routes_BM > 0).to(index.device)[index].unique(dim=0, return_inverse=True)[1]
        return [index[kind_B == kind] for kind in kind_B.unique()]

    def rows(self, index: Tensor) -> Rollout:
        """Choose rows, without the padding that none of them needs."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        last = int(picked["real_BT"].sum(1).amax()) if len(index) else 0
        picked |= {name: value[:, :last] for name, value in picked.items() if name.endswith("_BT")}
        shown = {name: prompts.rows(index) for name, prompts in self.shown.items()}
        return replace(self, prompts=self.prompts.rows(index), shown=shown, **picked)
