"""Make of finished runs all that a comparison found: rankings, quality at equal cost, costs, curves, gaps.

`command` calls this. `document` and `pictures` show what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_opd.errors import UserError
from lit_opd.files import finite
from lit_opd.lab.compare.collect import Point, RunResult
from lit_opd.lab.compare.paired import CONFIDENCE
from lit_opd.lab.compare.standings import Ranking, rank
from lit_opd.measures.table import describe, in_order

__all__ = ["SPENDINGS", "Curve", "EqualCost", "LeftOut", "Report", "make_report", "rank_at", "to_json", "value_at"]

SPENDINGS = {"step": "steps", "tokens": "sampled tokens", "seconds": "seconds of training"}
"""What a point of a curve has spent, in words."""

Curves = Mapping[str, Mapping[int, Sequence[Point]]]
"""Of one yardstick: variant -> seed -> its points by step."""


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the statistics, or not in all of them, and why."""

    variant: str
    seed: int
    status: str
    run_id: str
    why: str


@dataclass(frozen=True)
class Cost:
    """The costs of a variant's training, as means over its finished runs, None where nothing was recorded."""

    variant: str
    steps: float | None
    tokens: float | None
    seconds: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class Curve:
    """The learning curve of one run."""

    yardstick: str
    variant: str
    seed: int
    points: list[Point]


@dataclass(frozen=True)
class EqualCost:
    """The variants at one budget, the most that all runs have spent: a seed is the unit, the prompts are these."""

    cost: str  # a name of `SPENDINGS`
    budget: float  # in its unit
    ranking: Ranking


@dataclass(frozen=True)
class Report:
    """All that a comparison found."""

    budget: str  # of a run, in words
    confidence: float  # of all intervals; one minus it is the level of all tests
    variants: list[str]  # in the order in which they were asked for
    seeds: list[int]
    prompts: int
    differing: list[str]  # settings in which the variants are not all the same
    left_out: list[LeftOut]
    rankings: list[Ranking]  # one a yardstick, those with a direction first
    equal_costs: list[EqualCost]  # of every yardstick with a direction, one a kind of cost
    costs: list[Cost]  # one a variant
    curves: list[Curve]  # of all finished runs


def make_report(runs: Sequence[RunResult]) -> Report:
    """Compare the runs that finished, and name those that did not.

    Runs that cannot be paired are a `UserError`: other prompts, a variant and seed that finished twice, seeds of one
    variant that were configured differently.
    """
    finished = [run for run in runs if run.status == "FINISHED" and run.per_prompt]
    _check_pairs(finished)
    variants = list(dict.fromkeys(run.variant for run in runs))
    seeds = sorted({run.seed for run in runs})
    return Report(
        _budget(finished), CONFIDENCE, variants, seeds, len(finished[0].prompts) if finished else 0,
        _differing(finished), list(_left_out(runs, variants, seeds)), list(_rankings(finished)),
        list(_equal_costs(finished)),
        [_cost(variant, [run for run in finished if run.variant == variant]) for variant in variants],
        [Curve(name, run.variant, run.seed, points) for run in finished for name, points in run.curves.items()],
    )  # fmt: skip


def rank_at(yardstick: str, curves: Curves, cost: str) -> EqualCost | None:
    """Rank the variants where every run has spent as much as the one that spent least, or None without a value."""
    budget = min((getattr(run[-1], cost) for by_seed in curves.values() for run in by_seed.values()), default=0.0)
    values: dict[str, dict[int, list[float]]] = {}
    for variant, by_seed in curves.items():
        for seed, points in by_seed.items():
            if (value := value_at(points, cost, budget)) is not None:
                values.setdefault(variant, {})[seed] = [value]
    return EqualCost(cost, budget, rank(yardstick, values)) if values else None


def value_at(points: Sequence[Point], cost: str, budget: float) -> float | None:
    """Read off a curve's value where a budget was spent, linear between its points.

    It is None outside the curve, which is never extrapolated, and where it is not finite.
    """
    spent = [getattr(point, cost) for point in points]
    if not spent or not spent[0] <= budget <= spent[-1]:
        return None
    value = float(np.interp(budget, spent, [point.value for point in points]))
    return value if np.isfinite(value) else None


def to_json(report: Report) -> dict[str, Any]:
    """Write the report as JSON has it: numbers that are not finite become null."""
    return finite(asdict(report))


def _check_pairs(finished: Sequence[RunResult]) -> None:
    seen: dict[tuple[str, int], RunResult] = {}
    firsts: dict[str, RunResult] = {}
    for run in finished:
        _check_same_settings(firsts.setdefault(run.variant, run), run)
        _check_prompts(finished[0], run)
        twin = seen.setdefault((run.variant, run.seed), run)
        if twin is not run:
            found = f"two of {run.variant!r} with seed {run.seed}: {twin.run_id} and {run.run_id}"
            raise UserError("runs", "one finished run of a variant and seed", found, "Leave one of them out.")


def _check_same_settings(first: RunResult, run: RunResult) -> None:
    for key in _differing([first, run]):
        one, other = (f"{result.settings.get(key)!r} in {_name(result)}" for result in (first, run))
        remedy = "Make one of them anew, or give it another tag `variant` in MLflow."
        raise UserError("runs", f"one {key} for all seeds of {run.variant!r}", f"{one} and {other}", remedy)


def _check_prompts(first: RunResult, run: RunResult) -> None:
    if run.prompts != first.prompts:
        common = len(set(run.prompts) & set(first.prompts))
        expected = f"the {len(first.prompts)} validation prompts of {_name(first)}, in their order, in all"
        found = f"{len(run.prompts)} in {_name(run)}, {common} of them the same"
        remedy = "Compare runs of one validation set: leave the others out, or train them again with the same data."
        raise UserError("runs", expected, found, remedy)
    for key, values in run.per_prompt.items():
        if len(values) != len(run.prompts):
            expected = f"a value of {key} for each of {len(run.prompts)} prompts"
            raise UserError("runs", expected, f"{len(values)} in {_name(run)}", "Leave it out, or train it again.")


def _differing(runs: Sequence[RunResult]) -> list[str]:
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def _name(run: RunResult) -> str:
    return f"run {run.run_id} ({run.variant!r}, seed {run.seed})"


def _budget(finished: Sequence[RunResult]) -> str:
    steps = sorted({int(run.cost["steps"]) for run in finished if "steps" in run.cost})
    return f"{' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))} optimizer steps" if steps else ""


def _cost(variant: str, runs: Sequence[RunResult]) -> Cost:
    names = ("steps", "tokens", "seconds", "peak_memory_mb")
    known = [[run.cost[name] for run in runs if name in run.cost] for name in names]
    return Cost(variant, *(float(np.mean(values)) if values else None for values in known))


def _left_out(runs: Sequence[RunResult], variants: Sequence[str], seeds: Sequence[int]) -> Iterable[LeftOut]:
    for run in runs:
        odd = [key for key, values in run.per_prompt.items() if not np.isfinite(values).all()]
        if run.status != "FINISHED":
            why = run.status.lower() + (f" after {run.cost['steps']:g} steps" if "steps" in run.cost else "")
        elif not run.per_prompt:
            why = "finished without an evaluation"
        elif odd:
            why = f"not finite, so left out of these rankings: {', '.join(odd)}"
        else:
            continue
        yield LeftOut(run.variant, run.seed, run.status, run.run_id, why)
    known = {(run.variant, run.seed) for run in runs}
    for variant in variants:
        yield from (LeftOut(variant, seed, "MISSING", "", "no run") for seed in seeds if (variant, seed) not in known)


def _rankings(finished: Sequence[RunResult]) -> Iterable[Ranking]:
    for name in in_order(name for run in finished for name in run.per_prompt):
        values: dict[str, dict[int, list[float]]] = {}
        for run in finished:
            if name in run.per_prompt and np.isfinite(run.per_prompt[name]).all():
                values.setdefault(run.variant, {})[run.seed] = run.per_prompt[name]
        if values:
            yield rank(name, values)


def _equal_costs(finished: Sequence[RunResult]) -> Iterable[EqualCost]:
    for name in in_order(name for run in finished for name in run.curves if describe(name).better):
        curves: dict[str, dict[int, list[Point]]] = {}
        for run in finished:
            if run.curves.get(name):
                curves.setdefault(run.variant, {})[run.seed] = run.curves[name]
        yield from (equal for cost in SPENDINGS if (equal := rank_at(name, curves, cost)))
