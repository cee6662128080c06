"""Begin the loggers of a run: its MLflow run, the one it had, or none, and the others of `tracking.also`.

The commands call it before anything is written.
"""

from __future__ import annotations

import socket
from pathlib import Path

from lit_opd.config import Config
from lit_opd.errors import UserError
from lit_opd.tracking.mailbox import reason
from lit_opd.tracking.others import build_loggers
from lit_opd.tracking.run import FOLDER, RunLogger
from lit_opd.tracking.store import KEPT
from lit_opd.tracking.unrecorded import Unrecorded

__all__ = ["begin_run"]


def begin_run(config: Config, tags: dict[str, str], run_id: str | None = None, folder: Path | None = None) -> RunLogger:
    """Make the loggers of a run, with its MLflow run made or, where `run_id` is to be continued, found.

    Args:
        config: its `tracking` section, without MLflow where `uri` is null; the default name says estimator and pair.
        tags: of the design, merged with `tracking.tags`.
        run_id: an MLflow run to continue, which goes on where the store does not answer.
        folder: of the run; what MLflow does not get is kept in it, and `also` is written there.

    A store that refuses, or does not hold the run, is a `UserError`, as is another logger that does.
    """
    pair = f"{Path(tags['student']).name} <- {Path(tags['teacher']).name}"
    name = config.tracking.run_name or f"{tags['estimator']} · {pair} · seed {config.seed}"
    logger = _begin(config, name, tags, run_id, folder)
    try:
        logger.others = build_loggers(config.tracking, name, folder) if folder else []
    except UserError:
        if run_id is None:
            logger.drop()
        raise
    return logger


def _begin(config: Config, name: str, tags: dict[str, str], run_id: str | None, folder: Path | None) -> RunLogger:
    if config.tracking.uri is None:
        return Unrecorded(run_id)
    own = {FOLDER: f"{socket.gethostname()}:{folder.absolute()}"} if folder else {}
    logger = RunLogger(
        experiment_name=config.tracking.experiment,
        run_name=name,
        tracking_uri=config.tracking.uri,
        tags=own | tags | dict(config.tracking.tags),
        run_id=run_id,
        keep_in=(folder or Path(config.output_dir)) / KEPT,
    )
    try:
        logger.begin()
    except Exception as error:  # MLflow passes on whatever its database or its server raises
        remedy = "Correct it; to record a resumed run anew, delete run.json in output_dir."
        found = f"{config.tracking.uri!r}: {reason(error)}"
        raise UserError("tracking.uri", "an MLflow store that takes the run", found, remedy) from error
    return logger
