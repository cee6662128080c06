"""Read off learning curves how good variants are at equal steps, tokens and seconds; `digest` calls this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lit_opd.lab.compare.collect import Point
from lit_opd.lab.compare.paired import CONFIDENCE
from lit_opd.lab.compare.standings import Ranking, rank

__all__ = ["SPENDINGS", "Curves", "EqualCost", "rank_at_equal_cost", "value_at"]

SPENDINGS = {"step": "steps", "tokens": "sampled tokens", "seconds": "seconds of training"}
"""What a point of a curve has spent, in words."""

Curves = Mapping[str, Mapping[int, Sequence[Point]]]
"""Of one yardstick: variant -> seed -> its points by step."""


@dataclass(frozen=True)
class EqualCost:
    """The variants at one budget, the most that all runs have spent: a seed is the unit, the prompts are these."""

    cost: str  # a name of `SPENDINGS`
    budget: float  # in its unit
    ranking: Ranking


def value_at(points: Sequence[Point], cost: str, budget: float) -> float | None:
    """Read off a curve's value where a budget was spent, linear between its points.

    Args:
        points: by step.
        cost: a name of `SPENDINGS`.
        budget: in its unit.

    Returns:
        The value; None outside the curve, which is never extrapolated, and where it is not finite.
    """
    spent = [getattr(point, cost) for point in points]
    if not spent or not spent[0] <= budget <= spent[-1]:
        return None
    value = float(np.interp(budget, spent, [point.value for point in points]))
    return value if np.isfinite(value) else None


def rank_at_equal_cost(yardstick: str, curves: Curves, cost: str, confidence: float = CONFIDENCE) -> EqualCost | None:
    """Rank the variants where every run has spent as much as the one that spent least; None where none has a value.

    Args:
        yardstick: its name.
        curves: of it.
        cost: a name of `SPENDINGS`.
        confidence: of intervals and tests.
    """
    budget = min((getattr(run[-1], cost) for by_seed in curves.values() for run in by_seed.values()), default=0.0)
    read = {
        variant: {seed: value_at(points, cost, budget) for seed, points in by_seed.items()}
        for variant, by_seed in curves.items()
    }
    known = {name: {seed: [v] for seed, v in by_seed.items() if v is not None} for name, by_seed in read.items()}
    values = {variant: by_seed for variant, by_seed in known.items() if by_seed}
    return EqualCost(cost, budget, rank(yardstick, values, confidence)) if values else None
