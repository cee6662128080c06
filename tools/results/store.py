"""The numbers that the pages of results stand on: a comparison's report, trimmed, and what MLflow adds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from lit_opd.files import finite
from lit_opd.lab.compare.analysis import Analysis, Contrast, Row
from lit_opd.lab.compare.collect import Point
from lit_opd.lab.compare.digest import Cost, Curve, Curves, EqualCost, LeftOut, Report, values_at

YARDSTICKS = ("accuracy", "reverse_kl", "forward_kl", "student_entropy")
AT_EQUAL_COST = ("accuracy", "reverse_kl")
TRAINING = ("train/entropy", "rollout/length")
COSTS = ("tokens", "seconds")
DIGITS = 6
EVERY = 10  # steps between two values that are kept of what training logs

Stored = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """A comparison as it is stored.

    Attributes:
        name: on the pages.
        report: what `compare` found, without the curves of single runs.
        courses: yardstick -> variant -> step -> mean over the seeds.
        record: what MLflow adds, by `read_record`; empty without.
        figures: what a page puts before the name of a figure.
    """

    name: str
    report: Report
    courses: Mapping[str, Mapping[str, Mapping[str, float]]]
    record: Mapping[str, Any]
    figures: str


def trim(name: str, report: Mapping[str, Any], record: Mapping[str, Any]) -> Stored:
    """Keep what the pages show of a report, in few digits.

    Args:
        name: of the comparison on the pages.
        report: as `report.json` has it.
        record: what MLflow adds, by `read_record`; empty without.
    """
    curves = {key: _by_run(report, key) for key in YARDSTICKS}
    kept = {
        "metrics": {key: report["metrics"][key] for key in YARDSTICKS if key in report["metrics"]},
        "equal_costs": [asdict(equal) for key in AT_EQUAL_COST for equal in _equal_costs(key, curves[key], report)],
        "curves": [],
    }
    courses = {key: _course(by_variant) for key, by_variant in curves.items() if by_variant}
    stored = {"name": name, "report": {**report, **kept}, "courses": courses, "record": record}
    return _rounded(finite(stored))


def read(stored: Mapping[str, Any], figures: str) -> Results:
    """Turn what `trim` stored into the values that a report is written from."""
    report = stored["report"]
    lists = {
        "left_out": [LeftOut(**run) for run in report["left_out"]],
        "metrics": {key: _analysis(found) for key, found in report["metrics"].items()},
        "equal_costs": [EqualCost(**equal) for equal in report["equal_costs"]],
        "costs": [Cost(**cost) for cost in report["costs"]],
    }
    return Results(stored["name"], Report(**{**report, **lists}), stored["courses"], stored["record"], figures)


def read_curves(report: Mapping[str, Any]) -> list[Curve]:
    """Read the curves of all runs from `report.json`, without the points that are not finite."""
    return [
        Curve(**{**curve, "points": [Point(**point) for point in curve["points"] if point["value"] is not None]})
        for curve in report["curves"]
    ]


def read_record(client: MlflowClient, parent: str) -> dict[str, Any]:
    """Read what the report of a comparison does not hold: the time of its runs, and values of training steps.

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
        "wall_seconds": sum((child.info.end_time - child.info.start_time) / 1000 for child in children),
        "training": {
            name: {variant: _history(client, runs, name) for variant, runs in by_variant.items()} for name in TRAINING
        },
    }


def write(stored: Stored, path: Path) -> None:
    """Write the numbers, a line for every few of them, so that a difference can be read."""
    path.write_text(json.dumps(stored, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")


def _analysis(found: Mapping[str, Any]) -> Analysis:
    rows = [Row(variant, **row) for variant, row in found["variants"].items()]
    return Analysis(found["better"], found["scale"], rows, [Contrast(**one) for one in found["contrasts"]],
                    found["notes"])  # fmt: skip


def _by_run(report: Mapping[str, Any], name: str) -> Curves:
    found: dict[str, dict[int, Sequence[Point]]] = {}
    for curve in read_curves(report):
        if curve.yardstick == name and curve.points:
            found.setdefault(curve.variant, {})[curve.seed] = curve.points
    return found


def _course(by_variant: Curves) -> dict[str, dict[int, float]]:
    """Average over the seeds: variant -> step -> mean."""
    course: dict[str, dict[int, float]] = {}
    for variant, by_seed in by_variant.items():
        values: dict[int, list[float]] = {}
        for points in by_seed.values():
            for point in points:
                values.setdefault(point.step, []).append(point.value)
        course[variant] = {step: statistics.fmean(values[step]) for step in sorted(values)}
    return course


def _equal_costs(name: str, curves: Curves, report: Mapping[str, Any]) -> Iterable[EqualCost]:
    """Read the variants at equal tokens and seconds, but for those that have stopped writing.

    The budget is the least that any run has spent: a variant whose completions have shrunk to nothing would hold all
    others to their first steps, so one with less than half the median's tokens is left out.
    """
    tokens = {cost["variant"]: cost["tokens"] for cost in report["costs"] if cost["tokens"] is not None}
    least = statistics.median(tokens.values()) / 2 if tokens else 0.0
    kept = {variant: by_seed for variant, by_seed in curves.items() if tokens.get(variant, 0.0) >= least}
    return (equal for cost in COSTS if (equal := values_at(name, kept, cost)))


def _history(client: MlflowClient, runs: Sequence[Run], name: str) -> dict[int, float]:
    """Read what training logs: step -> mean over the runs."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for point in client.get_metric_history(run.info.run_id, name):
            if point.step == 1 or point.step % EVERY == 0:
                values.setdefault(point.step, []).append(point.value)
    return {step: statistics.fmean(values[step]) for step in sorted(values)}


def _rounded(value: Any) -> Any:
    """Round floats to few digits, and turn keys into those that JSON has."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
