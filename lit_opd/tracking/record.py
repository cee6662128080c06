"""Describe a run to MLflow while Lightning trains: its configuration, its completions, the load of its machine.

Why here: this is what makes a run readable years later without its folder. Every trainer of `fit` has `RunRecord`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger

from lit_opd.config import Config, to_flat
from lit_opd.evaluation import Example
from lit_opd.tracking.log import log_files, log_table, logger_of

__all__ = ["RunRecord", "log_examples"]

COMPLETIONS_FILE = "completions.json"


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
    if examples:
        log_table(logger, rows, COMPLETIONS_FILE)


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
            log_files(logger, {self.config_file.name: self.config_file.read_bytes()})
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


def _start_monitor(run_id: str | None, uri: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor
