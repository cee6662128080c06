"""The numbers that RESULTS.md stands on: a comparison's report, trimmed to what is shown, and what MLflow adds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from lit_opd.files import finite
from lit_opd.lab.compare.collect import Point
from lit_opd.lab.compare.digest import rank_at

YARDSTICKS = ("accuracy", "reverse_kl", "forward_kl", "student_entropy")
TRAINING = ("train/entropy", "rollout/length")
COSTS = ("tokens", "seconds")
DIGITS = 6
EVERY = 10  # steps between two values that are kept of what training logs

Stored = dict[str, Any]


def trim(name: str, report: Mapping[str, Any], record: Mapping[str, Any], machine: Mapping[str, Any]) -> Stored:
    """What RESULTS.md shows of a report, in few digits.

    Args:
        name: of the comparison in RESULTS.md.
        report: as `report.json` has it.
        record: what MLflow adds, by `read_record`; empty without.
        machine: on which the runs were made.
    """
    rankings = [ranking for ranking in report["rankings"] if ranking["yardstick"] in YARDSTICKS]
    curves = {key: _by_run(report["curves"], key) for key in YARDSTICKS}
    copied = ("confidence", "variants", "seeds", "prompts", "left_out", "costs")
    stored = {key: report[key] for key in copied} | {
        "name": name,
        "machine": machine,
        "record": record,
        "rankings": [_ranking(ranking) for ranking in sorted(rankings, key=_place)],
        "equal_costs": [_equal_cost(key, curves[key], report) for key in ("accuracy", "reverse_kl")],
        "curves": {key: _course(by_variant) for key, by_variant in curves.items() if by_variant},
    }
    return _rounded(finite(stored))


def read_record(client: MlflowClient, parent: str) -> dict[str, Any]:
    """What the report of a comparison does not hold: its commit, the time of its runs, and values of training steps.

    Args:
        client: of the tracking database.
        parent: the comparison's MLflow run.
    """
    run = client.get_run(parent)
    query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'FINISHED'"
    children = client.search_runs([run.info.experiment_id], query, order_by=["attributes.start_time ASC"])
    by_variant: dict[str, list[Run]] = {}
    for child in children:
        by_variant.setdefault(child.data.tags["variant"], []).append(child)
    return {
        "commit": run.data.tags.get("git_sha", "")[:7],
        "wall_seconds": sum((child.info.end_time - child.info.start_time) / 1000 for child in children),
        "training": {
            name: {variant: _history(client, runs, name) for variant, runs in by_variant.items()} for name in TRAINING
        },
    }


def write(stored: Stored, path: Path) -> None:
    """Write the numbers, a line for every few of them, so that a difference can be read."""
    path.write_text(json.dumps(stored, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")


def _ranking(ranking: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("mean", "low", "high", "seeds")
    rows = [row | {"mean": {name: row["mean"][name] for name in kept}} for row in ranking["rows"]]
    pairs = [pair | {"difference": {name: pair["difference"][name] for name in kept}} for pair in ranking["pairs"]]
    return {"yardstick": ranking["yardstick"], "sentence": ranking["sentence"], "rows": rows, "pairs": pairs}


def _place(ranking: Mapping[str, Any]) -> int:
    return YARDSTICKS.index(ranking["yardstick"])


def _by_run(curves: Iterable[Mapping[str, Any]], name: str) -> dict[str, dict[int, list[Point]]]:
    found: dict[str, dict[int, list[Point]]] = {}
    for curve in curves:
        points = [Point(**point) for point in curve["points"] if point["value"] is not None]
        if curve["yardstick"] == name and points:
            found.setdefault(curve["variant"], {})[curve["seed"]] = points
    return found


def _course(by_variant: Mapping[str, Mapping[int, Sequence[Point]]]) -> dict[str, dict[int, float]]:
    """Variant -> step -> mean over the seeds."""
    course: dict[str, dict[int, float]] = {}
    for variant, by_seed in by_variant.items():
        values: dict[int, list[float]] = {}
        for points in by_seed.values():
            for point in points:
                values.setdefault(point.step, []).append(point.value)
        course[variant] = {step: statistics.fmean(values[step]) for step in sorted(values)}
    return course


def _equal_cost(
    name: str, curves: Mapping[str, Mapping[int, Sequence[Point]]], report: Mapping[str, Any]
) -> dict[str, Any]:
    """The variants at equal tokens and seconds, but for those that have stopped writing.

    The budget is the least that any run has spent: a variant whose completions have shrunk to nothing would hold all
    others to their first steps, so one with less than half the median's tokens is left out.
    """
    tokens = {cost["variant"]: cost["tokens"] for cost in report["costs"] if cost["tokens"] is not None}
    least = statistics.median(tokens.values()) / 2 if tokens else 0.0
    kept = {variant: by_seed for variant, by_seed in curves.items() if tokens.get(variant, 0.0) >= least}
    found: dict[str, Any] = {"yardstick": name, "left_out": [variant for variant in curves if variant not in kept]}
    for cost in COSTS:
        if equal := rank_at(name, kept, cost):
            rows = _ranking(asdict(equal.ranking))["rows"]
            apart = [[pair.first, pair.second] for pair in equal.ranking.pairs if pair.distinguishable]
            found[cost] = {"budget": equal.budget, "rows": rows, "apart": apart}
    return found


def _history(client: MlflowClient, runs: Sequence[Run], name: str) -> dict[int, float]:
    """Step -> mean over the runs."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for point in client.get_metric_history(run.info.run_id, name):
            if point.step == 1 or point.step % EVERY == 0:
                values.setdefault(point.step, []).append(point.value)
    return {step: statistics.fmean(values[step]) for step in sorted(values)}


def _rounded(value: Any) -> Any:
    """The same with floats in few digits, and with the keys that JSON has."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
