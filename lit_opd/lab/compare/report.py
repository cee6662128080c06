"""From finished runs to one report: rankings with their pairs, quality at equal cost, costs, curves, gaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_opd.errors import UserError
from lit_opd.lab.compare.accounting import COSTS, Curves, at_equal_cost, common_budget, pareto_front
from lit_opd.lab.compare.ranking import Ranking, Values, rank
from lit_opd.lab.compare.records import Point, RunResult
from lit_opd.lab.compare.statistics import CONFIDENCE, RESAMPLES
from lit_opd.measures.table import describe, in_order
from lit_opd.runs.numbers import finite

__all__ = ["Cost", "Curve", "EqualCost", "Front", "LeftOut", "Report", "make_report", "to_json"]


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the statistics, or not in all of them, and why."""

    variant: str
    seed: int
    status: str
    run_id: str
    why: str


@dataclass(frozen=True)
class EqualCost:
    """The variants at one budget, from their curves: a seed is the unit, the prompts are these.

    Attributes:
        cost: a name of `accounting.COSTS`.
        budget: the most that all runs have spent.
        ranking: of their values there.
    """

    cost: str
    budget: float
    ranking: Ranking


@dataclass(frozen=True)
class Cost:
    """What a variant's training took, as means over its finished runs; None where it was not recorded."""

    variant: str
    steps: float | None
    tokens: float | None
    seconds: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class Front:
    """The variants that no other beats in both quality and cost, by their means.

    Attributes:
        yardstick: the quality.
        cost: `tokens` or `seconds`.
        variants: on the front, cheapest first.
    """

    yardstick: str
    cost: str
    variants: list[str]


@dataclass(frozen=True)
class Curve:
    """The learning curve of one run."""

    yardstick: str
    variant: str
    seed: int
    points: list[Point]


@dataclass(frozen=True)
class Report:
    """All that a comparison found.

    Attributes:
        title: of the report.
        budget: of every run, in words.
        confidence: of all intervals; one minus it is the level of all tests.
        variants: in the order in which they were asked for.
        seeds: of any of their runs.
        prompts: how many were measured.
        differing: settings in which the variants are not all the same.
        left_out: runs that failed, were killed, are missing or measured nothing.
        rankings: one a yardstick, those with a direction first.
        equal_costs: of every yardstick with a direction and curves, one a kind of cost.
        costs: one a variant.
        fronts: one a yardstick and cost.
        curves: of all finished runs.
    """

    title: str
    budget: str
    confidence: float
    variants: list[str]
    seeds: list[int]
    prompts: int
    differing: list[str]
    left_out: list[LeftOut]
    rankings: list[Ranking]
    equal_costs: list[EqualCost]
    costs: list[Cost]
    fronts: list[Front]
    curves: list[Curve]


def make_report(
    runs: Sequence[RunResult],
    *,
    title: str = "Comparison",
    budget: str = "",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Report:
    """Compare runs; those that did not finish are named and left out.

    Args:
        runs: of all variants and seeds.
        title: of the report.
        budget: of every run, in words.
        confidence: of intervals; one minus it is the level of tests.
        resamples: of bootstraps and sign flips.

    Raises:
        UserError: runs that cannot be paired: other prompts, or a variant and seed that finished twice; seeds of one
            variant that were configured differently.
    """
    finished = [run for run in runs if run.status == "FINISHED" and run.per_prompt]
    _check_pairs(finished)
    variants = list(dict.fromkeys(run.variant for run in runs))
    seeds = sorted({run.seed for run in runs})
    names = in_order(name for run in finished for name in run.per_prompt)
    rankings = [rank(name, _values(finished, name), confidence, resamples) for name in names]
    rankings = [ranking for ranking in rankings if ranking.rows]
    costs = [_cost(variant, [run for run in finished if run.variant == variant]) for variant in variants]
    return Report(
        title, budget, confidence, variants, seeds, len(finished[0].prompts) if finished else 0, _differing(finished),
        [*_left_out(runs, variants, seeds), *_not_finite(finished)], rankings,
        list(_equal_costs(finished, confidence, resamples)), costs, list(_fronts(rankings, costs)),
        [Curve(name, run.variant, run.seed, list(points)) for run in finished for name, points in run.curves.items()],
    )  # fmt: skip


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON has it: numbers that are not finite become null."""
    return finite(asdict(report))


def _check_pairs(finished: Sequence[RunResult]) -> None:
    seen: dict[tuple[str, int], RunResult] = {}
    firsts: dict[str, RunResult] = {}
    for run in finished:
        _check_same_settings(firsts.setdefault(run.variant, run), run)
        name, first = _name(run), finished[0]
        if run.prompts != first.prompts:
            common = len(set(run.prompts) & set(first.prompts))
            raise UserError(
                "runs", f"the {len(first.prompts)} validation prompts of {_name(first)}, in their order, in all",
                f"{len(run.prompts)} in {name}, {common} of them the same",
                "Compare runs of one validation set: leave the others out, or train them again with the same data.",
            )  # fmt: skip
        odd = [key for key, values in run.per_prompt.items() if len(values) != len(run.prompts)]
        if odd:
            found = f"{len(run.per_prompt[odd[0]])} in {name}"
            expected = f"a value of {odd[0]} for each of {len(run.prompts)} prompts"
            raise UserError("runs", expected, found, "Leave that run out, or train it again.")
        twin = seen.setdefault((run.variant, run.seed), run)
        if twin is not run:
            found = f"two of {run.variant!r} with seed {run.seed}: {twin.run_id} and {run.run_id}"
            raise UserError("runs", "one finished run of a variant and seed", found, "Leave one of them out.")


def _check_same_settings(first: RunResult, run: RunResult) -> None:
    for key in _differing([first, run]):
        one, other = (f"{result.settings.get(key)!r} in {_name(result)}" for result in (first, run))
        raise UserError("runs", f"one {key} for all seeds of {run.variant!r}", f"{one} and {other}",
                        "Make one of them anew, or give it another tag `variant` in MLflow.")  # fmt: skip


def _differing(runs: Sequence[RunResult]) -> list[str]:
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def _name(run: RunResult) -> str:
    return f"run {run.run_id} ({run.variant!r}, seed {run.seed})"


def _values(finished: Sequence[RunResult], yardstick: str) -> Values:
    values: dict[str, dict[int, np.ndarray]] = {}
    for run in finished:
        array = np.asarray(run.per_prompt.get(yardstick, []), dtype=np.float64)
        if array.size and np.isfinite(array).all():
            values.setdefault(run.variant, {})[run.seed] = array
    return values


def _left_out(runs: Sequence[RunResult], variants: Sequence[str], seeds: Sequence[int]) -> Iterable[LeftOut]:
    for run in runs:
        if run.status == "FINISHED" and run.per_prompt:
            continue
        steps = run.cost.get("steps")
        done = "" if steps is None else f" after {steps:g} steps"
        why = "finished without an evaluation" if run.status == "FINISHED" else f"{run.status.lower()}{done}"
        yield LeftOut(run.variant, run.seed, run.status, run.run_id, why)
    known = {(run.variant, run.seed) for run in runs}
    for variant in variants:
        yield from (LeftOut(variant, seed, "MISSING", "", "no run") for seed in seeds if (variant, seed) not in known)


def _not_finite(finished: Sequence[RunResult]) -> Iterable[LeftOut]:
    for run in finished:
        odd = [key for key, values in run.per_prompt.items() if not np.isfinite(values).all()]
        if odd:
            why = f"not finite, so left out of these rankings: {', '.join(odd)}"
            yield LeftOut(run.variant, run.seed, run.status, run.run_id, why)


def _equal_costs(finished: Sequence[RunResult], confidence: float, resamples: int) -> Iterable[EqualCost]:
    names = [name for name in in_order(key for run in finished for key in run.curves) if describe(name).better]
    for name in names:
        curves: dict[str, dict[int, list[Point]]] = {}
        for run in finished:
            if run.curves.get(name):
                curves.setdefault(run.variant, {})[run.seed] = run.curves[name]
        for cost in COSTS:
            yield from _equal_cost(name, curves, cost, confidence, resamples)


def _equal_cost(name: str, curves: Curves, cost: str, confidence: float, resamples: int) -> Iterable[EqualCost]:
    budget = common_budget(curves, cost)
    values = {} if budget is None else at_equal_cost(curves, cost, budget)
    if budget is not None and values:
        yield EqualCost(cost, budget, rank(name, values, confidence, resamples))


def _cost(variant: str, runs: Sequence[RunResult]) -> Cost:
    def mean(key: str) -> float | None:
        values = [run.cost[key] for run in runs if key in run.cost]
        return float(np.mean(values)) if values else None

    return Cost(variant, mean("steps"), mean("tokens"), mean("seconds"), mean("peak_memory_mb"))


def _fronts(rankings: Sequence[Ranking], costs: Sequence[Cost]) -> Iterable[Front]:
    for ranking in rankings:
        better = describe(ranking.yardstick).better
        quality = {row.variant: row.mean.mean for row in ranking.rows}
        for kind in ("tokens", "seconds") if better else ():
            spent = {c.variant: getattr(c, kind) for c in costs if c.variant in quality}
            spent = {variant: value for variant, value in spent.items() if value is not None}
            names = sorted(spent, key=lambda variant: spent[variant])
            kept = pareto_front([spent[v] for v in names], [quality[v] for v in names], better or "lower")
            if names:
                front = [variant for variant, keep in zip(names, kept, strict=True) if keep]
                yield Front(ranking.yardstick, kind, front)
