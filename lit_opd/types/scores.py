"""Hold what a teacher or a reference says of the counted tokens of a rollout.

Made by scorers, read by the objective and by evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_opd.types.rollouts import Rollout

__all__ = ["Distributions", "ScoredRollout", "Scores"]


class Distributions(Protocol):
    """Next-token distributions of a frozen model at N positions, made a few at a time."""

    def __len__(self) -> int:
        """Count the positions, N."""
        ...

    def __getitem__(self, index: Tensor | slice) -> Distributions:
        """Choose positions."""
        ...

    def logps(self, part: slice) -> Tensor:
        """Make log-probabilities [c, V], nats in fp32, of a slice of positions."""
        ...


@dataclass(frozen=True)
class Scores:
    """A scorer's answer about the N counted tokens of a rollout, None where it was not asked.

    Attributes:
        logps_N: log-probabilities of the sampled tokens.
        support_ids_NK: the scorer's K most probable tokens at each position, the most probable first.
        support_logps_NK: their log-probabilities under the full softmax.
        full: distributions over the whole vocabulary.
        aligned_N: of a scorer that reads other tokens, True where one of them spells exactly this one; else None. Its
            `logps_N` are then right as sums over all later tokens alone.
    """

    logps_N: Tensor | None = None
    support_ids_NK: Tensor | None = None
    support_logps_NK: Tensor | None = None
    full: Distributions | None = None
    aligned_N: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Scores:
        """Choose positions."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Scores(**{name: None if value is None else value[index] for name, value in values.items()})


class ScoredRollout(NamedTuple):
    """A rollout, or a micro-batch of one, with what scorers say of its counted tokens.

    Attributes:
        rollout: the completions.
        scores: by the name of the scorer: `teacher`, and `reference` where one is asked.
        progress: the share of training that is done, 0 to 1.
        merged: groups of tokens that the scores count as one symbol, each under its first member. Whole distributions
            are not merged yet.
    """

    rollout: Rollout
    scores: Mapping[str, Scores]
    progress: float = 0.0
    merged: Sequence[Sequence[int]] = ()

    def rows(self, index: Tensor) -> ScoredRollout:
        """Choose rows of the rollout and of all scores."""
        mask_BT = self.rollout.mask_BT
        number_BT = torch.zeros(mask_BT.shape, dtype=torch.long, device=mask_BT.device)
        number_BT[mask_BT] = torch.arange(int(mask_BT.sum()), device=mask_BT.device)
        chosen_N = number_BT[index][mask_BT[index]]
        scores = {name: scores[chosen_N] for name, scores in self.scores.items()}
        return self._replace(rollout=self.rollout.rows(index), scores=scores)
