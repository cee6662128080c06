"""Say what a scorer is, and what an estimator asks of one.

A scorer gives log-probabilities of tokens that somebody else wrote. The teacher of a run is one, and so is a reference
model. `Distiller.score` asks scorers before any student activation exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lit_opd.estimators import BoundEstimator
from lit_opd.estimators.needs import FILLERS
from lit_opd.functional import Groups
from lit_opd.types import Ended, Rollout, Scores

__all__ = ["FULL", "MERGED", "SUPPORT", "TOKEN", "Scorer", "Wanted", "wanted_by"]

TOKEN = "token"
"""Given by a scorer: log-probabilities of the sampled tokens."""
SUPPORT = "support"
"""Given by a scorer: its most probable tokens at every position, and their log-probabilities."""
FULL = "full"
"""Given by a scorer: log-probabilities of the whole vocabulary."""
MERGED = "merged"
"""Given by a scorer: the first two with groups of tokens counted as one symbol each."""


class Wanted(NamedTuple):
    """The scores that a scorer is asked for.

    Attributes:
        token: log-probabilities of the sampled tokens.
        support: K, how many of the scorer's most probable tokens; 0 for none.
        full: distributions over the whole vocabulary, from which the rest can be told.
        merged: groups of tokens to count as one symbol, in `token` and `support`; whoever reads `full` merges it.
    """

    token: bool = True
    support: int = 0
    full: bool = False
    merged: Groups = ()

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of scores that the scorer has to be able to give."""
        asked = {TOKEN: True, SUPPORT: self.support, FULL: self.full, MERGED: self.merged}
        return frozenset(kind for kind, wanted in asked.items() if wanted)


@runtime_checkable
class Scorer(Protocol):
    """Scores tokens that somebody else wrote.

    Attributes:
        name: the scorer's role, by which its scores and the prompts it reads are found.
        gives: what it can give, of `TOKEN`, `SUPPORT`, `FULL` and `MERGED`.
        longest: the tokens of the longest row, prompt and completion, that it takes; None where nothing is known.
    """

    name: str
    gives: frozenset[str]
    longest: int | None = None

    def score(self, rollout: Rollout, wanted: Wanted) -> Scores:
        """Score the counted tokens of a rollout.

        Args:
            rollout: completions after the prompts that the student read; `rollout.seen_by(name)` has the scorer's own.
            wanted: no more than this is given.

        Returns:
            Scores of the N counted tokens in row-major order, log-probabilities in fp32 nats.
        """
        ...

    def score_each(self, rollouts: Sequence[Rollout], wanted: Wanted) -> list[Scores]:
        """Score several micro-batches, one after the other unless the scorer can do more at once."""
        return [self.score(rollout, wanted) for rollout in rollouts]

    def ahead(self, wanted: Wanted) -> Ended | None:
        """Give what begins to score a completion as soon as it has ended, while others are still being sampled.

        Returns:
            None where nothing is gained by it. Otherwise a function for `PromptBatch.ended` of one batch: `score`
            finds what it began, and what nobody scores until the next call is dropped.
        """
        return None

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of the scorer, in plain values and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as the scorer whose state a checkpoint holds, which is empty where it holds none."""
        return

    def check_update(self, totals: Mapping[str, float], step: int) -> None:
        """Refuse to make an update that was scored badly, as its sums over all processes tell. Most accept all."""
        return

    def untempered(self) -> Scorer:
        """Give the scorer at temperature 1, which evaluations compare with."""
        return self

    def present(self) -> AbstractContextManager[None]:
        """Hold what scoring needs in place for several calls, as the weights of an offloaded model."""
        return nullcontext()


def wanted_by(estimator: BoundEstimator) -> Wanted:
    """Tell what an estimator asks of the teacher: whole distributions for what depends on the student's, too."""
    others = any(t.estimator.support_size and t.estimator.support != "teacher" for t in estimator.terms)
    full = others or any(FILLERS[need].whole for need in estimator.needs)
    return Wanted(token=True, support=0 if full else estimator.largest_support, full=full)
