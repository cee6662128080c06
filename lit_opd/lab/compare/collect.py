"""Read from MLflow what runs measured, prompt by prompt and along the way, and what it cost.

`command` calls this. Runs leave nothing else behind that a comparison reads, so runs of any age can be compared.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_opd.errors import UserError
from lit_opd.lab.compare.grid import within
from lit_opd.lab.compare.runs import PARENT
from lit_opd.tracking import MlflowClient, MlflowException, MlflowRun

__all__ = ["Point", "RunResult", "collect", "read_run"]

SPENT = ("cost/tokens", "cost/seconds")
PEAK = "cost/peak_memory_mb"
EVERY_STEP = "perf/step_s"
PROMPTS_FILE = "prompts.json"
# What a run learns from and how; the rest of its configuration is where it is written to and what is looked at.
LEARNING = ("student", "teacher", "reference", "data", "rollout", "estimator", "optim", "evaluation",
            "trainer.max_steps", "trainer.max_epochs", "trainer.precision")  # fmt: skip
TRAINING_DATA = "dataset_sha256"


@dataclass(frozen=True)
class Point:
    """A place on a learning curve."""

    step: int  # optimizer steps done
    tokens: float  # completion tokens sampled for training so far
    seconds: float  # spent in training steps so far, evaluations not counted
    value: float  # of the yardstick


@dataclass(frozen=True)
class RunResult:
    """One run: a variant with a seed.

    `per_prompt` has the final value of every prompt: the mean over the prompt's tokens, or over its completions for
    accuracy, length and truncation; nats where the yardstick has them.
    """

    variant: str  # what sets it apart from the others, e.g. `token` or `hybrid gamma=0.5`
    seed: int  # runs of one seed saw the same prompts and the same uniform numbers
    status: str  # of the MLflow run: FINISHED, FAILED, KILLED
    run_id: str  # of the MLflow run
    prompts: tuple[str, ...]  # hash of every validation prompt, in order; the same in all runs that may be paired
    per_prompt: dict[str, list[float]]  # by yardstick, in the order of `prompts`
    curves: dict[str, list[Point]] = field(default_factory=dict)  # by yardstick: means over all prompts, by step
    cost: dict[str, float] = field(default_factory=dict)  # steps, tokens and seconds when last evaluated, peak memory
    settings: dict[str, str] = field(default_factory=dict)  # what it learned from and how, by key
    teacher: dict[str, float] = field(default_factory=dict)  # by yardstick: the teacher's own value, if measured
    commit: str = ""  # of the code that made it


def collect(client: MlflowClient, run_ids: Sequence[str]) -> list[RunResult]:
    """Read the results of runs, in the order in which they began, if they can be told apart.

    The id of a comparison stands for its runs. A run that was recorded twice because its first beginning was lost
    counts once, as it was last.
    """
    if not run_ids:
        raise UserError("--from-runs", "ids of MLflow runs", "none", "Name them.")
    found: dict[tuple[str, int], RunResult] = {}
    for run_id in run_ids:
        run = _get_run(client, run_id)
        results = {(r.variant, r.seed): r for r in (read_run(client, r) for r in _children(client, run) or [run])}
        for key in results.keys() & found.keys():
            pair = f"{found[key].run_id} and {results[key].run_id} are both {key[0]!r} with seed {key[1]}"
            remedy = "Leave one out, or give one another tag `variant` in MLflow."
            raise UserError("--from-runs", "one run of every variant and seed", pair, remedy)
        found |= results
    return list(found.values())


def read_run(client: MlflowClient, run: MlflowRun) -> RunResult:
    """Read what one MLflow run leaves behind, which of a finished one are results prompt by prompt and costs."""
    names = [name for name in run.data.metrics if name.startswith("val/") or name in (*SPENT, EVERY_STEP)]
    histories = {name: _history(client, run, name) for name in names}
    tokens, seconds = (histories.get(name, {}) for name in SPENT)
    known = sorted(tokens.keys() & seconds.keys())
    if run.info.status == "FINISHED" and not known:
        found, remedy = f"neither in {run.info.run_id}", "Run it again."
        raise UserError("--from-runs", f"runs that logged {' and '.join(SPENT)}", found, remedy)
    curves = {
        name.removeprefix("val/"): [Point(s, tokens[s], seconds[s], history[s]) for s in known if s in history]
        for name, history in histories.items() if name.startswith("val/")
    }  # fmt: skip
    steps = max((step for history in histories.values() for step in history), default=0)
    last = known[-1] if known else 0
    cost = {"steps": float(steps), "tokens": tokens.get(last, 0.0), "seconds": seconds.get(last, 0.0)}
    cost |= {"peak_memory_mb": run.data.metrics[PEAK]} if PEAK in run.data.metrics else {}
    settings = {key: value for key, value in run.data.params.items() if within(key, LEARNING)}
    settings |= {key: value for key, value in run.data.tags.items() if key == TRAINING_DATA}
    prompts, per_prompt = _prompts(client, run)
    teacher = {name: run.data.metrics[f"teacher/{name}"] for name in curves if f"teacher/{name}" in run.data.metrics}
    variant, seed, info = _variant(run), int(run.data.tags.get("seed", 0)), run.info
    commit = run.data.tags.get("git_sha", "")
    return RunResult(
        variant, seed, info.status, info.run_id, prompts, per_prompt, curves, cost, settings, teacher, commit
    )


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
    """Map steps to values, of which the later one counts where a resumed run logged a step twice."""
    points = client.get_metric_history(run.info.run_id, name)
    return {point.step: point.value for point in sorted(points, key=lambda point: (point.step, point.timestamp))}


def _prompts(client: MlflowClient, run: MlflowRun) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Read the hashes of the prompts, and yardstick -> the mean of each, NaN where nothing was counted."""
    run_id = run.info.run_id
    if not any(file.path == PROMPTS_FILE for file in client.list_artifacts(run_id)):
        if run.info.status != "FINISHED":
            return (), {}
        raise UserError("--from-runs", f"runs with the artifact {PROMPTS_FILE}", f"none in {run_id}", "Run it again.")
    with tempfile.TemporaryDirectory() as folder:
        table = json.loads(Path(client.download_artifacts(run_id, PROMPTS_FILE, folder)).read_text())
    sums, weights = table["sums"], table["weights"]
    means = {name: [s / w if w else math.nan for s, w in zip(sums[name], weights[name], strict=True)] for name in sums}
    return tuple(table["prompts"]), means


def _variant(run: MlflowRun) -> str:
    prefix, params = "estimator.kwargs.", sorted(run.data.params.items())
    name = run.data.params.get("estimator.name", run.data.tags.get("estimator", "unknown"))
    words = [f"{key.removeprefix(prefix)}={value}" for key, value in params if key.startswith(prefix)]
    label = run.data.tags.get("variant") or " ".join([name, *words])
    # Reports write labels between backticks on one line; a tag in MLflow may hold anything.
    return "".join(letter if letter.isprintable() else " " for letter in label.replace("`", "'"))
