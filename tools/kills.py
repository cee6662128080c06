"""Kill a run at every write and at random times, resume it, and compare with a run that nobody disturbed.

Usage, from the root of the repository::

    python -m tools.kills [--every 1] [--times 20]

It trains the shipped pair for a few steps, once for each point: before a file moves into its place, before one is
flushed to the disk (``--every 5`` takes every fifth of these writes), and at ``--times`` random moments. The process
gets SIGKILL there, and ``fit --resume auto`` goes on. Weights, optimizer, export, results, completions and the points
of MLflow's metrics must be those of the undisturbed run, each once, and no MLflow run may be left RUNNING. It prints a
line for each point, and ends with exit code 1 where one differs. For Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import mlflow as _  # noqa: F401  (imported once, here: the runs are forks)
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from lit_opd.cli import main as lit_opd
from lit_opd.commands import running as _running  # noqa: F401

SIZES = ("output_dir=run", "trainer.max_steps=3", "evaluation.every_n_steps=2", "evaluation.num_examples=2",
         "data.train_size=8", "data.validation_size=2", "data.batch_size=4", "rollout.max_new_tokens=4",
         "optim.warmup_steps=0", "diagnostics.figures=false", "tracking.uri=sqlite:///mlflow.db",
         "tracking.system_metrics=false")  # fmt: skip
COMMAND = ("fit", "--config", str(Path(__file__).parents[1] / "conf" / "quickstart.yaml"), *SIZES, "--resume", "auto")
STATE = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "torch_rng_state")
# What a clock measures differs from run to run, and so do places and, where somebody commits meanwhile, the commit.
MEASURED = ("perf/", "cost/seconds", "cost/median", "cost/peak")
OWN_TAGS = ("run_folder", "exported_student", "mlflow.runName", "mlflow.source.git.commit")
UNLIKE = ("last.ckpt", "summary.json", "run.json")  # files with some of that, which are compared by their parts


def start(folder: Path, fatal: int = 0) -> int:
    """Start the run of a folder in a process of its own, which dies before the write of that number.

    Returns:
        The id of the process.
    """
    process = os.fork()
    if process:
        return process
    os.chdir(folder)
    for stream, name in ((1, "said"), (2, "said"), (3, "writes")):
        os.dup2(os.open(name, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    count = iter(range(1, sys.maxsize))

    def dying(kind: str, call: Callable[..., Any], path: Callable[..., str]) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            os.write(3, f"{kind} {Path(path(*args)).name}\n".encode())
            if next(count) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return write

    os.replace = dying("move to", os.replace, lambda source, target: target)
    os.fsync = dying("flush", os.fsync, lambda file: os.readlink(f"/proc/self/fd/{file}"))
    code = 1
    try:
        code = lit_opd(COMMAND)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # and do nothing of what is left to do for the process that this one is a copy of


def wait(process: int) -> int:
    """Wait for a process and return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(folder: Path, after: float) -> int:
    """Start the run of a folder, kill it after so many seconds, and return its exit code."""
    process = start(folder)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    return wait(process)


def left_by(folder: Path) -> dict[str, Any]:
    """Collect by name what a run left in its folder and in MLflow, apart from times and ids."""
    run = folder / "run"
    files = {str(file.relative_to(run)): file for file in sorted(run.rglob("*")) if file.is_file()}
    run_id = json.loads((run / "run.json").read_text())["mlflow_run_id"].encode()
    found: dict[str, Any] = {
        name: file.name in UNLIKE or file.read_bytes().replace(run_id, b"RUN") for name, file in files.items()
    }
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    found |= {f"checkpoint: {name}": _bytes(checkpoint[name]) for name in STATE}
    summary, notes = (json.loads((run / name).read_text()) for name in ("summary.json", "run.json"))
    found |= {f"results: {name}": summary[name] for name in ("before", "after", "teacher", "steps")}
    found |= {f"notes: {name}": notes[name] for name in ("before", "teacher", "ended")}
    return found | dict(_told(MlflowClient(f"sqlite:///{folder / 'mlflow.db'}"), folder))


def _told(client: MlflowClient, folder: Path) -> Iterator[tuple[str, Any]]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, run_view_type=ViewType.ALL)
    yield "MLflow: runs", [run.info.status for run in runs]
    run = runs[0]
    yield "MLflow: parameters", run.data.params
    yield "MLflow: tags", {name: value for name, value in run.data.tags.items() if name not in OWN_TAGS}
    yield "MLflow: data sets", sorted(given.dataset.digest for given in run.inputs.dataset_inputs)
    yield "MLflow: models", [model.step for model in run.outputs.model_outputs]
    for name in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, name)
        yield f"MLflow: {name}", [(p.step, None if name.startswith(MEASURED) else p.value) for p in points]
    (kept := folder / "kept").mkdir()
    place = Path(client.download_artifacts(run.info.run_id, "", str(kept)))
    yield "MLflow: files", sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())
    yield "MLflow: completions", json.loads((place / "completions.json").read_text())["data"]


def _bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bytes(held) for key, held in value.items()}
    return [_bytes(held) for held in value] if isinstance(value, list | tuple) else value


def verdict(folder: Path, killed: int, wanted: dict[str, Any]) -> str:
    """Resume a run that was killed, and say what differs at its end, or that nothing does."""
    if killed != -signal.SIGKILL:
        return f"WRONG: not killed, but exit code {killed}"
    if code := wait(start(folder)):
        return f"WRONG: resumed with exit code {code}: {(folder / 'said').read_text()[-500:]}"
    found = left_by(folder)
    unlike = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"WRONG: {', '.join(unlike)}" if unlike else "the same end"


def main() -> int:
    """Kill the run at all points, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill at each so many of the writes; 0: at none")
    parser.add_argument("--times", type=int, default=20, help="and at so many random times")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        empty = Path(place, "mlflow.db")  # its tables take longer to make than the run
        MlflowClient(f"sqlite:///{empty}").search_experiments()

        def new(name: str) -> Path:
            (folder := Path(place, name)).mkdir()
            shutil.copy(empty, folder)
            return folder

        began, whole = time.monotonic(), new("whole")
        if wait(start(whole)):
            sys.exit((whole / "said").read_text())
        took, writes, wanted = time.monotonic() - began, (whole / "writes").read_text().splitlines(), left_by(whole)
        print(f"undisturbed: {took:.1f} s, {len(writes)} writes, {len(wanted)} things to compare", flush=True)
        for number in range(1, len(writes) + 1, asked.every) if asked.every else ():
            folder = new(f"write {number}")
            said = verdict(folder, wait(start(folder, number)), wanted)
            print(f"before write {number}, {writes[number - 1]}: {said}", flush=True)
            wrong += said.startswith("WRONG")
        draw = random.Random(0)
        for number in range(asked.times):
            after, folder = draw.uniform(0, took), new(f"time {number}")
            while not (killed := kill(folder, after)):  # it had ended before
                after, folder = 0.9 * after, new(f"time {number}, {after}")
            said = verdict(folder, killed, wanted)
            print(f"after {after:.2f} s: {said}", flush=True)
            wrong += said.startswith("WRONG")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
