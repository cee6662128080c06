"""Hold the MLflow run of a training or a measurement from its beginning to its end.

Why here: MLflow learns how a run ended, and a resumed run goes on in the MLflow run it had. `begin_run` makes a logger,
and the commands end it when its results are written.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from lit_opd.config import Config
from lit_opd.errors import concealed
from lit_opd.tracking.fitting import RunClient, fit_tags
from lit_opd.tracking.mailbox import REFUSALS, Mailbox
from lit_opd.tracking.others import end_loggers
from lit_opd.tracking.store import KEPT, connect

__all__ = ["FOLDER", "RunLogger", "git_sha", "ui_command"]

FOLDER = "run_folder"  # the tag that names the machine and the folder of a run


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger for a run that goes on without MLflow, and is KILLED where it was interrupted.

    Arguments are those of `MLFlowLogger`. A continued run gets the tags too.

    Args:
        keep_in: the folder for what MLflow does not get while it is away.
    """

    def __init__(
        self, experiment_name: str = "lightning_logs", run_name: str | None = None, tracking_uri: str = "",
        tags: Mapping[str, Any] | None = None, run_id: str | None = None, artifact_location: str | None = None,
        keep_in: str | Path = KEPT,
    ) -> None:  # fmt: skip
        # Not that of MLFlowLogger: it opens the database, which may be locked or still to be made by another run.
        Logger.__init__(self)
        self._initialized = False
        self._experiment_name, self._run_name, self._tracking_uri = experiment_name, run_name, tracking_uri
        self._experiment_id, self._run_id = None, run_id
        self._artifact_location, self._log_model, self._checkpoint_callback = artifact_location, False, None
        self.tags: dict[str, Any] = dict(tags or {})
        again = run_id is not None
        self._mailbox = Mailbox(lambda: connect(tracking_uri, again), tracking_uri, Path(keep_in))
        self.last_steps: dict[str, int] = {}  # by metric, those of an earlier process too
        self.others: list[Logger] = []

    @property
    def loggers(self) -> list[Logger]:
        """This logger and the others of the run, for its trainer."""
        return [self, *self.others]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Begin the run where it was not, and return MLflow's client behind a `Mailbox`."""
        if not self._initialized:
            self.begin()
        return self._mailbox

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what is a number, as a mean over nothing is no point of a curve, and no metric twice at a step."""
        now = int(time.time() * 1000)
        values = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
        # Lightning adds the number of the epoch to whatever it logs.
        new = {name: value for name, value in values.items() if step is None or self.last_steps.get(name) != step}
        self.last_steps |= dict.fromkeys(new, step or 0)
        if new:
            points = [Metric(name, value, now, step or 0) for name, value in new.items()]
            self.experiment.log_batch(self.run_id, metrics=points)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log parameters."""
        values = dict(params) if isinstance(params, Mapping) else vars(params)
        self.experiment.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in values.items()])

    @rank_zero_only
    def begin(self) -> None:
        """Make the MLflow run, or find the one to continue, for which nothing that goes wrong matters but a refusal."""
        self._initialized = True
        if self._run_id is None:
            self._run_id, self._experiment_id = self._mailbox.ask(self._find_or_make)
            return
        self._mailbox.open(self._run_id)
        run_id: str = self._run_id
        try:
            run = self._mailbox.ask(lambda client: client.get_run(run_id))
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                raise
        else:
            self._experiment_id = run.info.experiment_id
            self.last_steps = {metric.key: metric.step for metric in run.data._metric_objs}
            if run.info.lifecycle_stage == "deleted":
                raise MlflowException(f"run {self._run_id} was deleted: `mlflow runs restore` brings it back")
        self._mailbox.update_run(self._run_id, status="RUNNING")
        self._mailbox.log_batch(self._run_id, tags=[RunTag(key, str(value)) for key, value in self.tags.items()])

    def _find_or_make(self, client: RunClient) -> tuple[str, str]:
        name = self._experiment_name
        if client.get_experiment_by_name(name) is None:
            try:
                client.create_experiment(name, artifact_location=self._artifact_location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run has made it meanwhile
                    raise
        found: Any = client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            restore = f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
            raise MlflowException(f"experiment {name!r} was deleted: {restore}")
        tags = fit_tags(self.tags)
        run_id = _abandoned(client, found.experiment_id, tags.get(FOLDER))
        if run_id is None:
            tags |= {"mlflow.runName": self._run_name[:250]} if self._run_name else {}
            run_id = client.create_run(found.experiment_id, tags=resolve_tags(tags)).info.run_id
        return run_id, found.experiment_id

    def finalize(self, status: str = "success") -> None:
        """End the run that broke off. One that went well goes on: whoever writes its results ends it."""
        if status == "failed":
            self.end("KILLED" if isinstance(sys.exception(), KeyboardInterrupt) else "FAILED")

    @rank_zero_only
    def drop(self) -> None:
        """Delete the MLflow run of a mistake, by which nothing was made."""
        self.experiment.delete_run(self.run_id)

    @rank_zero_only
    def end(self, status: str) -> None:
        """Give the MLflow run its last status and say what could not be sent, and end the other loggers."""
        if self._initialized:
            self.experiment.set_terminated(self.run_id, status)
            self._mailbox.close(hurry=status == "KILLED")
        end_loggers(self.others, status)


def _abandoned(client: RunClient, experiment: str, folder: str | None) -> str | None:
    """Find the MLflow run of a process that was killed before it had written into its folder which one it has."""
    if folder is None or "'" in folder:
        return None
    begun = f"tags.{FOLDER} = '{folder}' and attributes.status = 'RUNNING'"
    return next((run.info.run_id for run in client.search_runs([experiment], begun) if not run.data.metrics), None)


def git_sha() -> dict[str, str]:
    """Read the commit of the current folder as a tag, none outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_sha": done.stdout.strip()}


def ui_command(config: Config, logger: MLFlowLogger) -> str:
    """Spell the command that opens the MLflow UI on this run, and the address to open."""
    if config.tracking.uri is None:
        return "not told of this run (tracking.uri=null)"
    uri = concealed(config.tracking.uri)
    page = f"/#/experiments/{logger.experiment_id}/runs/{logger.run_id}"
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    command = f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000"
    return f"{command}\n  then open http://127.0.0.1:5000{page}"
