"""Hand values to the loggers of a run: metrics, tags, tables and files, each by one road.

Why here: callbacks and commands say what is to be kept, and only this room knows how MLflow wants it. Metrics go to
every logger of the trainer, as those do that the module logs; all else goes to MLflow, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger

__all__ = ["log_files", "log_metrics", "log_table", "log_tag", "logger_of"]


def logger_of(trainer: L.Trainer) -> MLFlowLogger | None:
    """Find the MLflow logger of the first process, None in the others and where there is none."""
    found = [logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)]
    return found[0] if found and trainer.is_global_zero else None


def log_metrics(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Log numbers from a callback, at once and whatever `trainer.log_every_n_steps`."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step)


def log_tag(logger: MLFlowLogger | None, key: str, value: str) -> None:
    """Tag the run, where there is a logger."""
    if logger is not None:
        logger.experiment.set_tag(logger.run_id, key, value)


def log_table(logger: MLFlowLogger | None, columns: Mapping[str, Sequence[Any]], file: str) -> None:
    """Append rows, by name of their column, to the table `NAME.json` of the run, where there is a logger."""
    if logger is not None:
        logger.experiment.log_table(logger.run_id, dict(columns), file)


def log_files(logger: MLFlowLogger | None, files: Mapping[str, bytes | str], folder: str | None = None) -> None:
    """Keep files (name -> content) as artifacts of the run, in a folder of it or its own, where there is a logger."""
    if logger is None:
        return
    with TemporaryDirectory() as place:
        for name, content in files.items():
            Path(place, name).write_bytes(content.encode() if isinstance(content, str) else content)
        logger.experiment.log_artifacts(logger.run_id, place, folder)
