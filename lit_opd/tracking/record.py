"""Describe a run to MLflow while Lightning trains: its configuration, its completions, the load of its machine.

Why here: this is what makes a run readable years later without its folder. Every trainer of `fit` has `RunRecord`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger
from mlflow.entities import Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from lit_opd.config import Config, to_flat
from lit_opd.evaluation import Example
from lit_opd.tracking.fitting import RunClient, fit_name, fit_value
from lit_opd.tracking.log import log_files, log_table, logger_of
from lit_opd.tracking.mailbox import message
from lit_opd.tracking.run import RunLogger

__all__ = ["RunRecord", "log_examples"]

COMPLETIONS_FILE = "completions.json"
NOWHERE = "http://127.0.0.1"  # for the client that MLflow's monitor makes, and that nobody asks here


def log_examples(logger: MLFlowLogger, examples: list[Example], policy: str, step: int) -> None:
    """Append completions of a `policy` (`before`, `student` or `teacher`) at an optimizer step to the run's table."""
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
    if examples:
        log_table(logger, rows, COMPLETIONS_FILE)


class RunRecord(L.Callback):
    """Gives a run its configuration (parameters, and `config.yaml` as artifact), completions and system metrics."""

    def __init__(self, config: Config, config_file: Path) -> None:
        self.config, self.config_file = config, config_file
        self._monitor: Any = None
        self._described = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Describe the run once, and measure its system while a loop of Lightning is under way."""
        logger = logger_of(trainer)
        if not self._described:
            self._describe(trainer, logger)
        self._described = True
        if not isinstance(logger, RunLogger):
            return
        if self.config.tracking.system_metrics and self._monitor is None:
            self._monitor = SystemLoad(logger)
            self._monitor.start()

    def _describe(self, trainer: L.Trainer, logger: MLFlowLogger | None) -> None:
        values = {name: value for name, value in to_flat(self.config).items() if value not in (None, {}, [])}
        for other in trainer.loggers:
            if not isinstance(other, MLFlowLogger):
                other.log_hyperparams(values)
        if isinstance(logger, RunLogger):
            log_files(logger, {self.config_file.name: self.config_file.read_bytes()})
            logger.experiment.describe_run(logger.run_id, {name: str(value) for name, value in values.items()})

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


@message
def describe_run(client: RunClient, run_id: str, values: dict[str, str]) -> None:
    """Log the configuration as parameters, and what changed since they were logged as tags `changed.NAME`.

    MLflow keeps the first value of a parameter.
    """
    known, held = client.get_run(run_id).data.params, {}
    for name, value in values.items():
        name, value = fit_name(name), fit_value(value, MAX_PARAM_VAL_LENGTH)
        if known.get(name, value) != value:
            held[f"changed.{name}"] = f"{value} (was {known[name]})"
    client.log_batch(
        run_id,
        params=[Param(name, value) for name, value in values.items() if fit_name(name) not in known],
        tags=[RunTag(name, value) for name, value in held.items()],
    )


class SystemLoad(SystemMetricsMonitor):
    """MLflow's measurements of the system, which go through the run's logger and do not end while MLflow is away.

    A continued run has measurements already.
    """

    def __init__(self, logger: RunLogger) -> None:
        super().__init__(logger.run_id, sampling_interval=5, tracking_uri=NOWHERE)
        self._logger = logger
        done = [step for name, step in logger.last_steps.items() if name.startswith(self._metrics_prefix)]
        self._logging_step = max(done, default=-1) + 1

    def monitor(self) -> None:
        """Measure and log until the end."""
        while not self._shutdown_event.is_set():
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                self._shutdown_event.wait(self.sampling_interval)
            values = {f"{self._metrics_prefix}{name}": value for name, value in self.aggregate_metrics().items()}
            self._logger.log_metrics(values, self._logging_step)
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()
