"""From MLflow to results: what runs measured, prompt by prompt and along the way, and what it cost."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_opd.errors import UserError
from lit_opd.lab.compare.grid import within
from lit_opd.lab.compare.records import Point, RunResult
from lit_opd.lab.compare.runs import PARENT
from lit_opd.tracking import MlflowClient, MlflowException, MlflowRun

__all__ = ["collect", "read_run"]

SPENT = ("cost/tokens", "cost/seconds")
PEAK = "cost/peak_memory_mb"
EVERY_STEP = "perf/step_s"
PROMPTS_FILE = "prompts.json"
# What a run learns from and how; the rest of its configuration is where it is written to and what is looked at.
LEARNING = ("student", "teacher", "reference", "data", "rollout", "estimator", "optim", "evaluation",
            "trainer.max_steps", "trainer.max_epochs", "trainer.precision")  # fmt: skip
TRAINING_DATA = "dataset_sha256"


def collect(client: MlflowClient, run_ids: Sequence[str]) -> list[RunResult]:
    """The results of runs, in the order in which they began; the id of a comparison stands for its runs.

    A run that was recorded twice because its first beginning was lost counts once, as it was last.

    Raises:
        UserError: no run, or no such run; two runs that cannot be told apart; one without results prompt by prompt
            or costs.
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
        UserError: it finished, but without results prompt by prompt or without its costs.
    """
    names = [name for name in run.data.metrics if name.startswith("val/") or name in (*SPENT, EVERY_STEP)]
    histories = {name: _history(client, run, name) for name in names}
    steps = max((step for history in histories.values() for step in history), default=0)
    tokens, seconds = (histories.get(name, {}) for name in SPENT)
    known = sorted(tokens.keys() & seconds.keys())
    if run.info.status == "FINISHED" and not known:
        raise UserError("--from-runs", f"runs that logged {' and '.join(SPENT)}", f"neither in {run.info.run_id}",
                        "Run it again.")  # fmt: skip
    curves = {
        name.removeprefix("val/"): [Point(s, tokens[s], seconds[s], history[s]) for s in known if s in history]
        for name, history in histories.items() if name.startswith("val/")
    }  # fmt: skip
    last = known[-1] if known else 0
    cost = {"steps": float(steps), "tokens": tokens.get(last, 0.0), "seconds": seconds.get(last, 0.0)}
    memory = run.data.metrics.get(PEAK)
    prompts = _prompts(client, run)
    return RunResult(
        variant=_variant(run), seed=int(run.data.tags.get("seed", 0)), status=run.info.status, run_id=run.info.run_id,
        prompts=tuple(prompts["prompts"]), per_prompt=_means(prompts["sums"], prompts["weights"]), curves=curves,
        cost=cost if memory is None else cost | {"peak_memory_mb": memory}, settings=_settings(run),
    )  # fmt: skip


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


def _settings(run: MlflowRun) -> dict[str, str]:
    told = {key: value for key, value in run.data.params.items() if within(key, LEARNING)}
    return told | {key: value for key, value in run.data.tags.items() if key == TRAINING_DATA}


def _variant(run: MlflowRun) -> str:
    prefix = "estimator.kwargs."
    words = [
        f"{key.removeprefix(prefix)}={value}"
        for key, value in sorted(run.data.params.items())
        if key.startswith(prefix)
    ]
    name = run.data.params.get("estimator.name", run.data.tags.get("estimator", "unknown"))
    return run.data.tags.get("variant") or " ".join([name, *words])
