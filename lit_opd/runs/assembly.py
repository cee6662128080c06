"""Put a run together and check it, before it writes anything.

`train` goes on from here, and a dry run ends here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L

from lit_opd import tracking
from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.errors import gather
from lit_opd.module import DistillationModule
from lit_opd.rollout import VllmEngine
from lit_opd.runs import torch_settings
from lit_opd.runs.best import check_measured
from lit_opd.runs.checkpoints import check_weights
from lit_opd.runs.folder import RunFolder, check_export
from lit_opd.runs.lightning_trainer import build_trainer, check_shares
from lit_opd.runs.outcome import Outcome, ended_before
from lit_opd.runs.prepare import check_row_lengths, prepare_data
from lit_opd.runs.resuming import check_changes

__all__ = ["Assembly", "assemble", "prepare"]


class Assembly(NamedTuple):
    """The parts of a run.

    Attributes:
        folder: what it may write to.
        trainer: without its logger.
        module: with the student's weights; the frozen ones have been read too.
        data: read and encoded.
        checkpoint: to go on from, None for a new run.
        known: the MLflow run that goes on, None for a new one.
    """

    folder: RunFolder
    trainer: L.Trainer
    module: DistillationModule
    data: PromptDataModule
    checkpoint: Path | None
    known: str | None


def assemble(config: Config, resume: str | None = None, profile: bool = False) -> Assembly | Outcome:
    """Put a run together, or find what came of it where it has ended, and write nothing.

    Raises:
        UserError: whatever cannot work.
    """
    folder = RunFolder(Path(config.output_dir))
    known = folder.read_notes().get("mlflow_run_id") if resume else None
    (checkpoint, ended), _, trainer, data = gather(
        partial(_claim, config, folder, resume),
        partial(tracking.check_tracking, config.tracking.uri, begun=known is not None),
        partial(build_trainer, config, folder, profile),
        partial(prepare, config),
    )
    if ended is not None:
        return ended
    check_shares(trainer, data)
    torch_settings.tell(config, trainer)
    module = DistillationModule.from_config(config)
    check_measured(config, module.scorer)
    check_row_lengths(data, module.scorer)
    if checkpoint is not None:
        check_weights("--resume", module.model, checkpoint)
    module.pair.read()
    if isinstance(module.engine, VllmEngine):
        module.engine.find()
    return Assembly(folder, trainer, module, data, checkpoint, known)


def prepare(config: Config) -> PromptDataModule:
    """Seed every library, then check what needs no weights and load the data."""
    L.seed_everything(config.seed, verbose=False)
    return prepare_data(config)


def _claim(config: Config, folder: RunFolder, resume: str | None) -> tuple[Path | None, Outcome | None]:
    """Find the checkpoint to go on from, and what came of the run if it has ended."""
    checkpoint, ended = folder.claim(resume), None
    if checkpoint is not None:
        ended = ended_before(config, folder, checkpoint)
        if ended is None:
            check_changes(config, checkpoint, own=folder.holds(checkpoint))
    check_export(config, folder.student)
    return checkpoint, ended
