"""Make of finished runs all that a comparison found: verdicts, costs, curves, gaps, and how it was made.

`command` calls this. `document` and `dots` show what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lit_opd.errors import UserError
from lit_opd.files import finite
from lit_opd.lab.compare.analysis import CONFIDENCE, Analysis, NotAboveZero, Rules, analyse
from lit_opd.lab.compare.collect import Point, RunResult
from lit_opd.lab.compare.contrasts import TO_THE_BEST, check_contrasts
from lit_opd.lab.compare.made import how_it_was_made
from lit_opd.measures.table import Measure, describe, in_order

__all__ = ["SPENDINGS", "Curve", "EqualCost", "LeftOut", "Report", "analysis_to_json", "make_report",
           "rules_for", "to_json", "value_at", "values_at"]  # fmt: skip

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
    """The values of a yardstick at one budget, the most that all runs have spent: means over seeds, not tested."""

    yardstick: str
    cost: str  # a name of `SPENDINGS`
    budget: float  # in its unit
    values: dict[str, float]  # by variant


@dataclass(frozen=True)
class Report:
    """All that a comparison found."""

    budget: str  # of a run, in words
    confidence: float  # of all intervals; one minus it is the level of all tests
    variants: list[str]  # in the order in which they were asked for
    seeds: list[int]
    prompts: int
    contrasts: str  # `best`, `all`, or the baseline
    differing: list[str]  # settings in which the variants are not all the same
    made: dict[str, str]  # models, data, rates, versions, commit, machine
    left_out: list[LeftOut]
    metrics: dict[str, Analysis]  # by yardstick, those with a direction first
    untrained: dict[str, float]  # by yardstick: of the student before training
    teacher: dict[str, float]  # by yardstick: of the teacher, where it was measured
    equal_costs: list[EqualCost]  # of every yardstick with a direction, one a kind of cost
    costs: list[Cost]  # one a variant
    curves: list[Curve]  # of all finished runs


def make_report(runs: Sequence[RunResult], contrasts: str = TO_THE_BEST) -> Report:
    """Compare the runs that finished, and name those that did not.

    Args:
        runs: of the comparison.
        contrasts: what is tested: `best`, `all`, or the name of a variant as the baseline.

    Raises:
        UserError: runs that cannot be paired: other prompts, a variant and seed that finished twice, seeds of one
            variant that were configured differently; or a baseline that is none of the variants.
    """
    finished = [run for run in runs if run.status == "FINISHED" and run.per_prompt]
    _check_pairs(finished)
    variants = list(dict.fromkeys(run.variant for run in runs))
    check_contrasts(contrasts, variants)
    seeds = sorted({run.seed for run in runs})
    untrained = _untrained(finished)
    return Report(
        _budget(finished), CONFIDENCE, variants, seeds, len(finished[0].prompts) if finished else 0, contrasts,
        _differing(finished), how_it_was_made(finished), list(_left_out(runs, variants, seeds)),
        dict(_metrics(finished, untrained, contrasts)), untrained, _means([run.teacher for run in finished]),
        list(_equal_costs(finished)),
        [_cost(variant, [run for run in finished if run.variant == variant]) for variant in variants],
        [Curve(name, run.variant, run.seed, points) for run in finished for name, points in run.curves.items()],
    )  # fmt: skip


def rules_for(measure: Measure, untrained: float | None, contrasts: str) -> Rules:
    """Take direction, scale and bounds of a yardstick from the table of measures."""
    return Rules(measure.better, measure.scale, *measure.bounds, untrained, contrasts)


def values_at(yardstick: str, curves: Curves, cost: str) -> EqualCost | None:
    """Average over seeds where every run has spent as much as the one that spent least, or None without a value."""
    budget = min((getattr(run[-1], cost) for by_seed in curves.values() for run in by_seed.values()), default=0.0)
    read = {variant: [value_at(points, cost, budget) for points in by_seed.values()]
            for variant, by_seed in curves.items()}  # fmt: skip
    known = {variant: [value for value in values if value is not None] for variant, values in read.items()}
    means = {variant: float(np.mean(values)) for variant, values in known.items() if values}
    return EqualCost(yardstick, cost, budget, means) if means else None


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
    metrics = {name: analysis_to_json(analysis) for name, analysis in report.metrics.items()}
    return finite(asdict(report) | {"metrics": metrics})


def analysis_to_json(analysis: Analysis) -> dict[str, Any]:
    """Write an analysis as JSON has it everywhere, variants by their labels."""
    variants = {}
    for row in analysis.rows:
        shown = asdict(row) | {"by_seed": {str(seed): value for seed, value in row.by_seed.items()}}
        variants[shown.pop("variant")] = shown
    contrasts = [asdict(contrast) for contrast in analysis.contrasts]
    told = {"better": analysis.better, "scale": analysis.scale, "notes": analysis.notes}
    return {"variants": variants, "contrasts": contrasts} | told


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
        odd = [key for key, values in run.per_prompt.items() if _is_partly_finite(values)]
        if run.status != "FINISHED":
            why = run.status.lower() + (f" after {run.cost['steps']:g} steps" if "steps" in run.cost else "")
        elif not run.per_prompt:
            why = "finished without an evaluation"
        elif odd:
            why = f"not finite for every prompt, so left out of {', '.join(odd)}"
        else:
            continue
        yield LeftOut(run.variant, run.seed, run.status, run.run_id, why)
    known = {(run.variant, run.seed) for run in runs}
    for variant in variants:
        yield from (LeftOut(variant, seed, "MISSING", "", "no run") for seed in seeds if (variant, seed) not in known)


def _metrics(
    finished: Sequence[RunResult], untrained: Mapping[str, float], contrasts: str
) -> Iterable[tuple[str, Analysis]]:
    for name in in_order(name for run in finished for name in run.per_prompt):
        values: dict[str, dict[int, list[float]]] = {}
        for run in finished:
            if name in run.per_prompt and not _is_partly_finite(run.per_prompt[name]):
                values.setdefault(run.variant, {})[run.seed] = run.per_prompt[name]
        if values:
            yield name, _analysed(name, values, rules_for(describe(name), untrained.get(name), contrasts))


def _is_partly_finite(values: Sequence[float]) -> bool:
    """Find values that cannot be averaged though the run did not diverge, where all of them would be lost."""
    finite_P = np.isfinite(values)
    return bool(finite_P.any() and not finite_P.all())


def _analysed(name: str, values: Mapping[str, Mapping[int, Sequence[float]]], rules: Rules) -> Analysis:
    try:
        return analyse(values, rules)
    except NotAboveZero:  # a mean that is zero, of a student that is its teacher, has no logarithm
        found = analyse(values, replace(rules, scale="raw"))
        return replace(found, notes=[*found.notes, "Compared as it is: a run's mean is 0, which has no logarithm."])


def _untrained(finished: Sequence[RunResult]) -> dict[str, float]:
    """Read off the curves what the student had before training, which all runs began from."""
    return _means([{name: points[0].value for name, points in run.curves.items() if points and points[0].step == 0}
                   for run in finished])  # fmt: skip


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in found for name in values)
    return {name: float(np.mean([values[name] for values in found if name in values])) for name in names}


def _equal_costs(finished: Sequence[RunResult]) -> Iterable[EqualCost]:
    for name in in_order(name for run in finished for name in run.curves if describe(name).better):
        curves: dict[str, dict[int, list[Point]]] = {}
        for run in finished:
            if run.curves.get(name):
                curves.setdefault(run.variant, {})[run.seed] = run.curves[name]
        yield from (equal for cost in SPENDINGS if (equal := values_at(name, curves, cost)))
