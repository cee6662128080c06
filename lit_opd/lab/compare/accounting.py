"""What quality costs: values at equal steps, tokens and seconds, and who is beaten in both quality and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lit_opd.lab.compare.ranking import Values
from lit_opd.lab.compare.records import Point
from lit_opd.measures.table import Better

__all__ = ["COSTS", "Curves", "at_equal_cost", "common_budget", "pareto_front", "value_at"]

COSTS = {"step": "steps", "tokens": "sampled tokens", "seconds": "seconds of training"}
"""What a point of a curve has spent, in words."""

Curves = Mapping[str, Mapping[int, Sequence[Point]]]
"""Of one yardstick: variant -> seed -> its points by step."""


def value_at(points: Sequence[Point], cost: str, budget: float) -> float | None:
    """A curve's value where a budget was spent, linear between its points.

    Args:
        points: by step.
        cost: a name of `COSTS`.
        budget: in its unit.

    Returns:
        The value; None outside the curve, which is never extrapolated.
    """
    spent = [getattr(point, cost) for point in points]
    if not spent or not spent[0] <= budget <= spent[-1]:
        return None
    return float(np.interp(budget, spent, [point.value for point in points]))


def common_budget(curves: Curves, cost: str) -> float | None:
    """The most that every run has spent; None without curves."""
    return min((getattr(points[-1], cost) for points in _runs(curves) if points), default=None)


def at_equal_cost(curves: Curves, cost: str, budget: float) -> Values:
    """Every run's value at one budget.

    Args:
        curves: of a yardstick.
        cost: a name of `COSTS`.
        budget: in its unit.

    Returns:
        One value a run, as `ranking.rank` takes them; runs without one are left out.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for variant, by_seed in curves.items():
        values = {seed: value_at(points, cost, budget) for seed, points in by_seed.items()}
        kept = {seed: np.array([value]) for seed, value in values.items() if value is not None and np.isfinite(value)}
        if kept:
            found[variant] = kept
    return found


def pareto_front(costs: Sequence[float], qualities: Sequence[float], better: Better) -> list[bool]:
    """Which points no other beats: none is at least as good at no more cost, and strictly so in one of the two.

    Args:
        costs: lower is better.
        qualities: of the same points.
        better: direction of the quality.
    """
    sign = 1.0 if better == "lower" else -1.0
    points = [(cost, sign * quality) for cost, quality in zip(costs, qualities, strict=True)]
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _runs(curves: Curves) -> Iterable[Sequence[Point]]:
    return (points for by_seed in curves.values() for points in by_seed.values())
