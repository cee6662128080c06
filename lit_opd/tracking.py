"""What goes to MLflow, in one place: the run, its tags, its configuration, its completions, and how it ended."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_opd.config import Config, to_flat
from lit_opd.errors import UserError
from lit_opd.evaluation import Example

__all__ = ["RunLogger", "RunRecord", "begin_run", "check_tracking", "log_examples", "logger_of", "ui_command"]

COMPLETIONS_FILE = "completions.json"
# The first bytes of every SQLite file.
SQLITE = b"SQLite format 3\0"


def check_tracking(uri: str) -> None:
    """Find out in seconds whether a tracking URI can answer; MLflow itself would retry for minutes.

    Raises:
        UserError: an unknown kind of URI, a server that does not answer, a folder that does not exist.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
        except (OSError, ValueError) as error:
            remedy = "Start the server, or set tracking.uri=sqlite:///mlflow.db."
            raise UserError("tracking.uri", "an MLflow server that answers", f"{uri!r}: {error}", remedy) from error
    elif parts.scheme == "sqlite":
        _check_database(Path(uri.removeprefix("sqlite:///")).expanduser())
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks", "file"):
        raise UserError("tracking.uri", "sqlite:///FILE, http://HOST:PORT or a database URI", repr(uri), "Correct it.")


def _check_database(file: Path) -> None:
    if not file.parent.is_dir():
        expected = "a database in an existing folder"
        raise UserError("tracking.uri", expected, f"no folder {str(file.parent)!r}", "Make it.")
    if file.is_dir() or (file.is_file() and file.stat().st_size and file.open("rb").read(len(SQLITE)) != SQLITE):
        raise UserError("tracking.uri", "an SQLite database or a new file", f"{str(file)!r}, which is another thing",
                        "Name another file.")  # fmt: skip


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger, which also tells a run that was interrupted (KILLED) from one that failed."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what is a number; a mean over nothing is no point of a curve."""
        super().log_metrics({name: value for name, value in metrics.items() if not math.isnan(value)}, step)

    @rank_zero_only
    def begin(self) -> None:
        """Make the MLflow run, or find the one to continue."""
        self.experiment.update_run(self.run_id, status="RUNNING")

    def finalize(self, status: str = "success") -> None:
        """End the run that broke off: FAILED, or KILLED after Ctrl-C.

        One that went well goes on after Lightning's loop: its results are still to be written, and whoever does that
        ends it.
        """
        if status == "failed":
            super().finalize(status)
            if isinstance(sys.exception(), KeyboardInterrupt):
                self.end("KILLED")

    @rank_zero_only
    def end(self, status: str) -> None:
        """Give the MLflow run its last status."""
        self.experiment.set_terminated(self.run_id, status)


def begin_run(config: Config, tags: dict[str, str], run_id: str | None = None) -> RunLogger:
    """The logger of a run, with the MLflow run made or, where it is to be continued, found.

    Args:
        config: its `tracking` section; the run's default name says estimator and pair.
        tags: of the design, merged with `tracking.tags`.
        run_id: an MLflow run to continue.

    Raises:
        UserError: the store refuses, or does not hold the run.
    """
    pair = f"{Path(tags['student']).name} <- {Path(tags['teacher']).name}"
    try:
        logger = RunLogger(
            experiment_name=config.tracking.experiment,
            run_name=config.tracking.run_name or f"{tags['estimator']} · {pair} · seed {config.seed}",
            tracking_uri=config.tracking.uri,
            tags=tags | dict(config.tracking.tags),
            run_id=run_id,
        )
        logger.begin()
    except Exception as error:  # MLflow passes on whatever its database or its server raises
        remedy = "Correct it; to record a resumed run anew, delete run.json in output_dir."
        found = f"{config.tracking.uri!r}: {error}"
        raise UserError("tracking.uri", "an MLflow store that takes the run", found, remedy) from error
    return logger


def git_sha() -> dict[str, str]:
    """The commit of the current folder as a tag; empty outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_sha": done.stdout.strip()}


def ui_command(config: Config, logger: MLFlowLogger) -> str:
    """The command that opens the MLflow UI on this run, and the address to open."""
    page = f"/#/experiments/{logger.experiment_id}/runs/{logger.run_id}"
    if config.tracking.uri.startswith("http"):
        return config.tracking.uri.rstrip("/") + page
    command = f"mlflow ui --backend-store-uri {config.tracking.uri} --host 127.0.0.1 --port 5000"
    return f"{command}\n  then open http://127.0.0.1:5000{page}"


def log_examples(logger: MLFlowLogger, examples: list[Example], policy: str, step: int) -> None:
    """Append completions to the run's table: prompt, completion, reward, per-token log-ratio.

    Args:
        logger: of the run.
        examples: what to show.
        policy: whose completions they are: `before`, `student`, `teacher`.
        step: optimizer step.
    """
    rows: dict[str, list[Any]] = {
        "step": [step] * len(examples),
        "policy": [policy] * len(examples),
        "prompt": [e.prompt for e in examples],
        "completion": [e.completion for e in examples],
        "reward": [e.reward for e in examples],
        "mean_log_ratio": [sum(e.log_ratios) / max(len(e.log_ratios), 1) for e in examples],
        "token_log_ratios": [
            json.dumps(list(zip(e.tokens, e.log_ratios, strict=True)), ensure_ascii=False) for e in examples
        ],
    }
    if examples and logger.run_id is not None:
        logger.experiment.log_table(logger.run_id, rows, COMPLETIONS_FILE)


class RunRecord(L.Callback):
    """Gives a run its configuration, its completions and its system metrics.

    Args:
        config: logged as parameters and, resolved, as the artifact `config.yaml`.
        config_file: the resolved configuration.
    """

    def __init__(self, config: Config, config_file: Path) -> None:
        self.config, self.config_file = config, config_file
        self._monitor: Any = None
        self._described = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Describe the run once, and measure its system while a loop of Lightning is under way."""
        logger = logger_of(trainer)
        if logger is None:
            return
        run_id = logger.run_id
        if not self._described:
            logger.experiment.log_artifact(run_id, str(self.config_file))
            # MLflow refuses another value for a parameter it has: after resuming, config.yaml tells what changed.
            known = logger.experiment.get_run(run_id).data.params
            values = {name: value for name, value in to_flat(self.config).items() if value not in (None, {}, [])}
            logger.log_hyperparams({name: value for name, value in values.items() if name not in known})
            self._described = True
        if self.config.tracking.system_metrics and self._monitor is None:
            self._monitor = _start_monitor(run_id, self.config.tracking.uri)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the examples of this evaluation."""
        logger = logger_of(trainer)
        if logger is not None and not trainer.sanity_checking:
            policy = "teacher" if pl_module.judged == "teacher" else "student" if trainer.global_step else "before"
            log_examples(logger, pl_module.examples, policy, trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop measuring the system."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop measuring the system."""
        self._stop()

    def _stop(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def logger_of(trainer: L.Trainer) -> MLFlowLogger | None:
    """The MLflow logger of the first process; None in the others, and where there is none."""
    found = [logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)]
    return found[0] if found and trainer.is_global_zero else None


def _start_monitor(run_id: str | None, uri: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor
