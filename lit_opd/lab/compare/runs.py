"""Make the runs of a comparison: a process each, several at once, to be stopped and gone on with at any time.

`command` calls this. `fit` does the work of a run and records it in MLflow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lit_opd.config import to_yaml
from lit_opd.errors import RunError, UserError
from lit_opd.files import write_file
from lit_opd.lab.compare.grid import Comparison, Run
from lit_opd.measures.drawing import look
from lit_opd.runs.folder import RunFolder
from lit_opd.stopping import heeding
from lit_opd.tracking import MlflowClient, MlflowException, git_sha

__all__ = ["PARENT", "begin_parent", "is_finished", "make_runs"]

PARENT = "mlflow.parentRunId"
COLOUR = "mlflow.runColor"  # of a run's lines and dots in MLflow's pages
POLL_S = 0.2
DAY_S = 86400


def begin_parent(comparison: Comparison, client: MlflowClient) -> str:
    """Make the MLflow run that the comparison's runs belong to, or find it again where the folder names it."""
    folder, tracking = Path(comparison.output_dir), comparison.tracking
    notes, described = folder / "comparison.json", folder / "comparison.yaml"
    write_file(described, to_yaml(comparison))
    try:
        if notes.is_file():
            parent = json.loads(notes.read_text())["mlflow_run_id"]
            held = client.get_experiment(client.get_run(parent).info.experiment_id).name
            if held != tracking.experiment:
                found, remedy = repr(tracking.experiment), "Set it back, or set output_dir=NEW."
                expected = f"{held!r}, in which this comparison is recorded"
                raise UserError("tracking.experiment", expected, found, remedy)
        else:
            known = client.get_experiment_by_name(tracking.experiment)
            experiment = known.experiment_id if known else client.create_experiment(tracking.experiment)
            name = tracking.run_name or f"comparison of {', '.join(comparison.variants)}"
            parent = client.create_run(experiment, run_name=name, tags=git_sha()).info.run_id
            write_file(notes, json.dumps({"mlflow_run_id": parent}))
        client.update_run(parent, status="RUNNING")
        client.log_artifact(parent, str(described))
    except UserError:
        raise
    except Exception as error:  # MLflow passes on whatever its database or its server raises
        remedy = f"Correct it; to record the comparison anew, delete {notes}."
        expected, found = "an MLflow store that takes the comparison", f"{tracking.uri!r}: {error}"
        raise UserError("tracking.uri", expected, found, remedy) from error
    return parent


def is_finished(run: Run, client: MlflowClient) -> bool:
    """Find out whether a run was made to its end, and MLflow knows."""
    folder = RunFolder(run.folder)
    known = folder.read_notes().get("mlflow_run_id")
    with suppress(MlflowException):
        return folder.summary.is_file() and known is not None and client.get_run(known).info.status == "FINISHED"
    return False


def make_runs(comparison: Comparison, runs: Sequence[Run], client: MlflowClient, parent: str, lock: int) -> bool:
    """Make the runs that are not finished yet, `parallel` at once, whether or not some of them fail.

    A run that was begun goes on from its last checkpoint. The first Ctrl-C (or SIGTERM, SIGHUP) lets the runs under
    way save and end, the second ends them at once, the third kills them. Runs inherit the descriptor `lock`. It returns
    True where it was interrupted before the last run had ended.
    """
    waiting = [run for run in runs if not is_finished(run, client)]
    # The colours of the report's pictures.
    colours = {name: look(number)["color"] for number, name in enumerate(dict.fromkeys(run.variant for run in runs))}
    for run in runs:
        if run not in waiting:
            _adopt(run, client, parent, colours[run.variant])
    workers: dict[subprocess.Popen[bytes], Run] = {}
    asked: list[int] = []  # signals, in the order in which they come
    told = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=DAY_S)
    bar = progress.add_task("", total=len(runs), completed=len(runs) - len(waiting))
    try:
        with heeding(lambda number, _: asked.append(number)), progress:
            while workers or (waiting and not asked):
                while waiting and not asked and len(workers) < comparison.parallel:
                    run = waiting.pop(0)
                    workers[_start(run, parent, colours[run.variant], comparison.parallel, lock)] = run
                for process in [process for process in workers if process.poll() is not None]:
                    said = _settle(workers.pop(process), process.returncode, client, parent, bool(asked))
                    progress.console.print(Text(said), soft_wrap=True)
                    progress.advance(bar)
                while told < len(asked):
                    told += 1
                    _send(signal.SIGKILL if told > 2 else signal.SIGINT, workers)
                names = ", ".join(run.name for run in workers.values())
                progress.update(bar, description=f"waiting for {names} to save and end" if asked else names)
                time.sleep(POLL_S)
    finally:
        _send(signal.SIGINT, workers)  # none are left but after an error
    return bool(asked) and not all(is_finished(run, client) for run in runs)


def _send(number: int, workers: dict[subprocess.Popen[bytes], Run]) -> None:
    """Send a signal to all processes of every run, as a terminal would."""
    for process in workers:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _start(run: Run, parent: str, colour: str, parallel: int, lock: int) -> subprocess.Popen[bytes]:
    tracking = replace(run.config.tracking, tags=run.config.tracking.tags | {PARENT: parent, COLOUR: colour})
    write_file(run.file, to_yaml(replace(run.config, tracking=tracking), secrets=True), private=True)
    command = [sys.executable, "-m", "lit_opd", "fit", "--config", str(run.file), "--resume", "auto"]
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // parallel))} if parallel > 1 else {}
    with run.log.open("ab") as log:
        # In a process group of its own: Ctrl-C in a terminal reaches a whole group, and this process passes it on.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock],
                                process_group=0, env=os.environ | share)  # fmt: skip


def _settle(run: Run, code: int, client: MlflowClient, parent: str, asked: bool) -> str:
    """Make sure that MLflow knows how a run ended, and say it in a line."""
    if code == 0:
        return f"done: {run.name}"
    known = RunFolder(run.folder).read_notes().get("mlflow_run_id")
    with suppress(RunError):  # no answer: the other runs go on
        if known is None and not asked:  # it did not come as far as to record itself
            experiment = client.get_run(parent).info.experiment_id
            tags = {PARENT: parent, "variant": run.variant, "seed": str(run.seed)}
            known = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        if known is not None and client.get_run(known).info.status == "RUNNING":
            client.set_terminated(known, "KILLED" if asked else "FAILED")
    return f"stopped: {run.name}" if asked else f"failed: {run.name}: {_last_words(run.log)} (all of it: {run.log})"


def _adopt(run: Run, client: MlflowClient, parent: str, colour: str) -> None:
    """Tag a finished run as one of this comparison: it may have been made under another parent, or another label."""
    run_id = RunFolder(run.folder).read_notes()["mlflow_run_id"]
    held = client.get_run(run_id).data.tags
    for key, value in {PARENT: parent, COLOUR: colour, "variant": run.variant}.items():
        if held.get(key) != value:
            client.set_tag(run_id, key, value)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "failed: "))]
    return (told or lines or ["it said nothing"])[-1]
