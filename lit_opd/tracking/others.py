"""Log metrics and configuration by Lightning's loggers too, beside MLflow or instead of it: `tracking.also`.

Tables, pictures and files stay in the run's folder and in MLflow. `begin_run` makes these loggers, and `RunLogger.end`
ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_opd.config import TrackingConfig
from lit_opd.errors import UserError
from lit_opd.files import write_file
from lit_opd.tracking.mailbox import reason

__all__ = ["build_loggers", "check_loggers", "end_loggers"]

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # one of them is needed


def check_loggers(names: Iterable[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        UserError: there is one.
    """
    for name in names:
        if name in PACKAGES and not any(find_spec(package) for package in PACKAGES[name]):
            remedy = f'Run: pip install "lit_opd[loggers]", or pip install {PACKAGES[name][0]}.'
            raise UserError("tracking.also", f"the package {PACKAGES[name][0]}", "no such package", remedy)


def build_loggers(config: TrackingConfig, run_name: str, folder: Path) -> list[Logger]:
    """Make the loggers that `tracking.also` names, which write into folders of the run's folder, and begin their runs.

    Raises:
        UserError: one of them cannot begin.
    """
    made: list[Logger] = []
    for name in dict.fromkeys(config.also):
        try:
            logger: Any = KINDS[name](config, run_name, folder)
            _ = logger.experiment  # which begins the run
        except Exception as error:  # whatever a service or a file system answers
            remedy = "Correct it, or leave it out. Weights & Biases needs no network with WANDB_MODE=offline."
            raise UserError("tracking.also", f"{name} to take the run", reason(error), remedy) from error
        made.append(logger)
    return made


@rank_zero_only
def end_loggers(loggers: Iterable[Logger], status: str) -> None:
    """Write what is left, and tell how the run ended: FINISHED, FAILED or KILLED."""
    for logger in loggers:
        logger.save()
        logger.finalize("success" if status == "FINISHED" else "failed")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=0 if status == "FINISHED" else 1)


def _csv(config: TrackingConfig, run_name: str, folder: Path) -> Logger:
    return CSVLogger(folder, name="csv")  # in a new folder version_N when resumed: it would empty an old one


def _tensorboard(config: TrackingConfig, run_name: str, folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)


def _wandb(config: TrackingConfig, run_name: str, folder: Path) -> Logger:
    """Go on with the run of Weights & Biases that an earlier process began for this folder."""
    file = folder / "wandb" / "run_id"
    known = file.read_text().strip() if file.is_file() else None
    logger = WandbLogger(run_name, folder, id=known, project=config.experiment)
    _ = logger.experiment  # which begins the run in the first process, and names it
    if known is None and logger.version:
        write_file(file, logger.version)
    return logger


KINDS: dict[str, Callable[[TrackingConfig, str, Path], Logger]] = {
    "csv": _csv, "tensorboard": _tensorboard, "wandb": _wandb,
}  # fmt: skip
