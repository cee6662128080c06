"""From MLflow to results: what runs measured, prompt by prompt and along the way, and what it cost."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lit_opd.errors import UserError
from lit_opd.lab.compare.records import Point, RunResult
from lit_opd.lab.compare.runs import PARENT

__all__ = ["collect", "read_run", "total_until"]

COSTS = ("perf/step_s", "perf/tokens_per_s", "perf/peak_memory_mb")
PROMPTS_FILE = "prompts.json"


def collect(client: MlflowClient, run_ids: Sequence[str]) -> list[RunResult]:
    """The results of runs, in the order in which they began; the id of a comparison stands for its runs.

    A run that was recorded twice because its first beginning was lost counts once, as it was last.

    Raises:
        UserError: no run, or no such run; two runs that cannot be told apart; one without results prompt by prompt.
    """
    if not run_ids:
        raise UserError("--from-runs", "ids of MLflow runs", "none", "Name them.")
    found: dict[tuple[str, int], RunResult] = {}
    for run_id in run_ids:
        run = _get_run(client, run_id)
        children = _children(client, run)
        results = {(result.variant, result.seed): result for result in (read_run(client, r) for r in children or [run])}
        for key in results.keys() & found.keys():
            pair = f"{found[key].run_id} and {results[key].run_id} are both {key[0]!r} with seed {key[1]}"
            raise UserError("--from-runs", "one run of every variant and seed", pair,
                            "Leave one out, or give one another tag `variant` in MLflow.")  # fmt: skip
        found |= results
    return list(found.values())


def read_run(client: MlflowClient, run: MlflowRun) -> RunResult:
    """What one MLflow run leaves behind.

    Raises:
        UserError: it finished, but without results prompt by prompt.
    """
    names = [name for name in run.data.metrics if name.startswith("val/") or name in COSTS]
    histories = {name: _history(client, run, name) for name in names}
    step_s, speeds = histories.get("perf/step_s", {}), histories.get("perf/tokens_per_s", {})
    tokens = {step: speeds[step] * seconds for step, seconds in step_s.items() if step in speeds}
    updates = int(run.data.params.get("optim.updates_per_rollout", 1))

    @cache
    def spent(step: int) -> tuple[float, float]:
        return total_until(tokens, step) / updates, total_until(step_s, step) / updates

    curves = {
        name.removeprefix("val/"): [Point(step, *spent(step), value) for step, value in sorted(history.items())]
        for name, history in histories.items() if name.startswith("val/")
    }  # fmt: skip
    steps = max((step for history in histories.values() for step in history), default=0)
    cost = dict(zip(("steps", "tokens", "seconds"), (float(steps), *spent(steps)), strict=True))
    memory = histories.get("perf/peak_memory_mb")
    prompts = _prompts(client, run)
    return RunResult(
        variant=_variant(run), seed=int(run.data.tags.get("seed", 0)), status=run.info.status, run_id=run.info.run_id,
        prompts=tuple(prompts["prompts"]), per_prompt=_means(prompts["sums"], prompts["weights"]), curves=curves,
        cost=cost | ({"peak_memory_mb": max(memory.values())} if memory else {}),
    )  # fmt: skip


def total_until(rates: Mapping[int, float], step: int) -> float:
    """The sum over steps 1 to `step` of what was logged at some of them.

    A logged value stands for the steps since the one logged before, and the last also for those after it: exact where
    every step was logged.

    Args:
        rates: step -> what it took.
        step: the last that counts.
    """
    total, begun = 0.0, 0
    for edge in sorted(rates):
        total += rates[edge] * (min(step, edge) - min(step, begun))
        begun = edge
    return total + rates[begun] * max(0, step - begun) if rates else 0.0


def _get_run(client: MlflowClient, run_id: str) -> MlflowRun:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        found, remedy = f"{run_id!r}: {error.message}", "Check it, and tracking.uri."
        raise UserError("--from-runs", "ids of MLflow runs", found, remedy) from error


def _children(client: MlflowClient, run: MlflowRun) -> list[MlflowRun]:
    belongs = f"tags.`{PARENT}` = '{run.info.run_id}'"
    return list(client.search_runs([run.info.experiment_id], belongs, order_by=["attributes.start_time ASC"]))


def _history(client: MlflowClient, run: MlflowRun, name: str) -> dict[int, float]:
    """Step -> value; a resumed run may have logged a step twice, and the later one counts."""
    points = client.get_metric_history(run.info.run_id, name)
    return {point.step: point.value for point in sorted(points, key=lambda point: (point.step, point.timestamp))}


def _prompts(client: MlflowClient, run: MlflowRun) -> dict[str, Any]:
    run_id = run.info.run_id
    if any(file.path == PROMPTS_FILE for file in client.list_artifacts(run_id)):
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(client.download_artifacts(run_id, PROMPTS_FILE, folder)).read_text())
    if run.info.status == "FINISHED":
        raise UserError("--from-runs", f"runs with the artifact {PROMPTS_FILE}", f"none in {run_id}", "Run it again.")
    return {"prompts": [], "sums": {}, "weights": {}}


def _means(sums: Mapping[str, list[float]], weights: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {
        name: [s / w if w else math.nan for s, w in zip(values, weights[name], strict=True)]
        for name, values in sums.items()
    }


def _variant(run: MlflowRun) -> str:
    prefix = "estimator.kwargs."
    words = [
        f"{key.removeprefix(prefix)}={value}"
        for key, value in sorted(run.data.params.items())
        if key.startswith(prefix)
    ]
    name = run.data.params.get("estimator.name", run.data.tags.get("estimator", "unknown"))
    return run.data.tags.get("variant") or " ".join([name, *words])
