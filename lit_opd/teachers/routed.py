"""Ask several teachers, each about the rows that are its own.

A row's teacher, or the weights of several, travel with the rollout (`routes_BM`). `micro_batches` never mixes rows of
different teachers, and `RoutedScorer` asks one teacher about all its micro-batches before the next, so that a model in
this process is present once a step. Which of them are in memory is `models.Pair.lend`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_opd.errors import UserError
from lit_opd.models import LanguageModel
from lit_opd.teachers.combined import combine, interleave
from lit_opd.teachers.frozen import LocalScorer
from lit_opd.teachers.scorer import FULL, MERGED, SUPPORT, TOKEN, Scorer, Wanted
from lit_opd.types import Ended, PromptBatch, Rollout, Scores

__all__ = ["RoutedScorer"]

EVERYTHING = frozenset({TOKEN, SUPPORT, FULL, MERGED})


@dataclass
class RoutedScorer(Scorer):
    """Scores every row with its own teacher, or with several at once.

    Attributes:
        scorers: by the teacher's name, in the order of the weights; None for a model of this process, which is lent.
        combined: `mixture` or `product`, of a row with several teachers; see `Combined`.
        lend: gives the scorer of such a model, and may let go of the one before.
        rows: positions of a mixture to look at at once.
        tempered: whether teachers have their own temperature, or 1.
        first: the teacher that was asked last, and is asked first the next time.
    """

    scorers: Mapping[str, Scorer | None]
    combined: str = "mixture"
    lend: Callable[[str], LocalScorer] | None = None
    rows: int = 1024
    tempered: bool = True
    first: str | None = None

    name = "teacher"

    def __post_init__(self) -> None:
        """Find out what all teachers can give, and take.

        Of merged tokens a mixture gives something, for it alone is merged as its parts are.
        """
        known = [scorer for scorer in self.scorers.values() if scorer is not None]
        merged = set() if self.combined == "mixture" else {MERGED}
        self.gives = EVERYTHING.intersection(*(scorer.gives for scorer in known)) - merged
        self.longest = min((one.longest for one in known if one.longest is not None), default=None)

    def lending(self, lend: Callable[[str], LocalScorer], rows: int) -> RoutedScorer:
        """Make the same scorer with what lends models of this process."""
        return replace(self, lend=lend, rows=rows)

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of every teacher that is a scorer of its own."""
        return {name: one.state() for name, one in self.scorers.items() if one is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Hand every such teacher its own."""
        for name, one in self.scorers.items():
            if one is not None:
                one.load_state(state.get(name, {}))

    def untempered(self) -> RoutedScorer:
        """Make the same scorer at temperature 1, with products normalised, which evaluations compare with."""
        combined = "geometric" if self.combined == "product" else self.combined
        return replace(self, tempered=False, combined=combined)

    @property
    def writes(self) -> bool:
        """True where every teacher is a model of this process, which can answer prompts too."""
        return all(scorer is None for scorer in self.scorers.values())

    def writer(self, name: str) -> LanguageModel:
        """Lend a teacher to answer prompts, and perhaps let go of the one before."""
        assert self.lend is not None
        return self.lend(name).model

    def shared_out(self, batch: PromptBatch) -> Iterator[tuple[str, PromptBatch]]:
        """Name each teacher that has prompts of a batch, with these as it reads them.

        A prompt of several teachers is given to the one with the largest weight.
        """
        assert batch.routes_BM is not None
        own_B = batch.routes_BM.argmax(1)
        for number, name in enumerate(self.scorers):
            if (own_B == number).any():
                part = batch.take(torch.nonzero(own_B == number).flatten())
                yield name, part._replace(prompts=part.shown.get(f"teachers.{name}", part.prompts))

    def ahead(self, wanted: Wanted) -> Ended | None:
        """Give what tells each teacher that works ahead of the completions that are its own."""
        known = {number: one.ahead(wanted) for number, one in enumerate(self.scorers.values()) if one is not None}
        begins = {number: begin for number, begin in known.items() if begin is not None}

        def begin_own(batch: PromptBatch, prompt: int, ids: list[int]) -> None:
            for number, begin in begins.items():
                if batch.routes_BM is not None and batch.routes_BM[prompt, number] > 0:
                    begin(batch, prompt, ids)

        return begin_own if begins else None

    def score(self, rollout: Rollout, wanted: Wanted) -> Scores:
        """Score the counted tokens of a rollout, in whose order its rows come back whatever their teachers."""
        device = rollout.mask_BT.device
        parts = rollout.by_teachers(torch.arange(len(rollout), device=device))
        found = self.score_each([rollout.rows(part) for part in parts], wanted)
        owner_B = torch.zeros(len(rollout), dtype=torch.long, device=device)
        for number, part in enumerate(parts):
            owner_B[part] = number
        return interleave(found, owner_B[torch.nonzero(rollout.mask_BT)[:, 0]])

    def score_each(self, rollouts: Sequence[Rollout], wanted: Wanted) -> list[Scores]:
        """Score several micro-batches, none of which holds rows of different teachers.

        Raises:
            UserError: a support of several teachers, of which one gives no whole distributions.
        """
        routes = [_teachers_of(rollout) for rollout in rollouts]
        found: list[dict[int, Scores]] = [{} for _ in rollouts]
        for number, name in self._order():
            mine = [i for i, route in enumerate(routes) if number in route]
            asks = {i: self._ask(routes[i], wanted) for i in mine}
            for asked in dict.fromkeys(asks.values()):
                some = [i for i in mine if asks[i] == asked]
                for i, scores in zip(some, self._asked(name, [rollouts[i] for i in some], asked), strict=True):
                    found[i][number] = scores
        return [self._combined(*pair, wanted) for pair in zip(rollouts, found, strict=True)]

    def _asked(self, name: str, rollouts: Sequence[Rollout], wanted: Wanted) -> list[Scores]:
        self.first = name
        scorer = self._scorer(name)
        with scorer.present():
            return scorer.score_each(rollouts, wanted)

    def _order(self) -> list[tuple[int, str]]:
        """List teachers with their numbers, the one that may still be in memory first."""
        return sorted(enumerate(self.scorers), key=lambda pair: pair[1] != self.first)

    def _scorer(self, name: str) -> Scorer:
        scorer = self.scorers[name]
        if scorer is None:
            assert self.lend is not None
            scorer = self.lend(name)
        return scorer if self.tempered else scorer.untempered()

    def _ask(self, route: Sequence[int], wanted: Wanted) -> Wanted:
        """Tell what each of a row's teachers has to give: for a mixture's own support, whole distributions."""
        if len(route) == 1 or not wanted.support:
            return wanted
        if FULL not in self.gives:
            expected = "one that compares no support: a mixture's most probable tokens take whole distributions"
            found = f"one that asks for {wanted.support} tokens of {len(route)} teachers at once"
            raise UserError("estimator.name", expected, found, "Set estimator.name=token, or one teacher a row.")
        return Wanted(full=True)

    def _combined(self, rollout: Rollout, found: Mapping[int, Scores], wanted: Wanted) -> Scores:
        numbers = sorted(found)
        if len(numbers) == 1:
            return found[numbers[0]]
        assert rollout.routes_BM is not None
        weights_NM = rollout.routes_BM[:, numbers][torch.nonzero(rollout.mask_BT)[:, 0]]
        ids_N, scores = rollout.ids_BT[rollout.mask_BT], [found[number] for number in numbers]
        return combine(scores, ids_N, weights_NM, self.combined, wanted, self.rows)


def _teachers_of(rollout: Rollout) -> list[int]:
    """Number the teachers of a micro-batch."""
    if rollout.routes_BM is None:
        expected = "batches that say which teacher a prompt is for"
        raise UserError("data", expected, "none", "Give the trainer a PromptDataModule with teacher_column=...")
    return torch.nonzero((rollout.routes_BM > 0).any(0)).flatten().tolist()
