"""Begin, name and end the MLflow run of a training or a measurement.

Why here: MLflow learns how a run ended, and a resumed run goes on in the MLflow run it had. The commands begin one
before anything is written, and end it when its results are.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_opd.config import Config
from lit_opd.errors import UserError

__all__ = ["RunLogger", "begin_run", "git_sha", "ui_command"]


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger, which also tells a run that was interrupted (KILLED) from one that failed."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what is a number, as a mean over nothing is no point of a curve."""
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
    def drop(self) -> None:
        """Delete the MLflow run of a mistake, by which nothing was made."""
        self.experiment.delete_run(self.run_id)

    @rank_zero_only
    def end(self, status: str) -> None:
        """Give the MLflow run its last status."""
        self.experiment.set_terminated(self.run_id, status)


def begin_run(config: Config, tags: dict[str, str], run_id: str | None = None) -> RunLogger:
    """Make the logger of a run, with its MLflow run made or, where it is to be continued, found.

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
    """Read the commit of the current folder as a tag, none outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_sha": done.stdout.strip()}


def ui_command(config: Config, logger: MLFlowLogger) -> str:
    """Spell the command that opens the MLflow UI on this run, and the address to open."""
    page = f"/#/experiments/{logger.experiment_id}/runs/{logger.run_id}"
    if config.tracking.uri.startswith("http"):
        return config.tracking.uri.rstrip("/") + page
    command = f"mlflow ui --backend-store-uri {config.tracking.uri} --host 127.0.0.1 --port 5000"
    return f"{command}\n  then open http://127.0.0.1:5000{page}"
