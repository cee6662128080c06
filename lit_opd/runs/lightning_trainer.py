"""Build the Lightning trainer of a run, from what the configuration may set and what other keys decide.

`train` and `evaluate` call it. `lab.compare` builds one of every variant too, to see mistakes before the first run.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_opd import callbacks
from lit_opd.config import Config
from lit_opd.config.limits import above, as_type, at_least, within
from lit_opd.errors import UserError, gather, suggest
from lit_opd.files import replacing
from lit_opd.plugins import call_object
from lit_opd.runs.best import keeper
from lit_opd.runs.folder import RunFolder
from lit_opd.tracking import RunRecord

__all__ = ["build_evaluation_trainer", "build_trainer", "check_shares", "check_trainer_keys"]

# Set here, from other keys where there are any; a second source would contradict them.
OWN_TRAINER_KEYS = {
    "logger": "See the section tracking.",
    "callbacks": "Set callbacks, at the top level.",
    "plugins": "In Python, give them to lightning.Trainer; see DistillationModule.",
    "default_root_dir": "Set output_dir.",
    "enable_checkpointing": "Checkpoints come every evaluation.every_n_steps.",
    "use_distributed_sampler": "The data module shares out the prompts.",
    "val_check_interval": "Set evaluation.every_n_steps.",
    "check_val_every_n_epoch": "Set evaluation.every_n_steps.",
    "gradient_clip_val": "Set optim.clip_norm.",
    "gradient_clip_algorithm": "Set optim.clip_norm.",
    "accumulate_grad_batches": "Set optim.micro_batch_tokens.",
    "overfit_batches": "Repeat a few prompts with data.train_size=N.",
    "fast_dev_run": "Set trainer.max_steps=2 data.validation_size=8.",
    "barebones": "It switches off what a run needs.",
    "limit_predict_batches": "No command predicts.",
    "sync_batchnorm": "Language models normalise no batches.",
    "model_registry": "MLflow has the models; see the section tracking.",
}
# What Lightning takes and what would train or measure nothing, or end without a word about the cause.
TRAINER_LIMITS = {
    "limit_train_batches": above(0, null="all"),
    "limit_val_batches": above(0, null="all"),
    "limit_test_batches": above(0, null="all"),
    "max_steps": within("of -1 (no limit) or at least 1", lambda steps: steps == -1 or steps > 0),
    "max_epochs": within("of -1 (no limit) or at least 1", lambda epochs: epochs is None or epochs == -1 or epochs > 0),
    "num_sanity_val_steps": within("of 0, as fit measures before training", lambda steps: steps in (0, None)),
    "max_time": within("longer than nothing", lambda time: time is None or re.search("[1-9]", str(time)) is not None),
    "log_every_n_steps": at_least(1),
    "precision": within(
        "of 32-true, 64-true, bf16-mixed or bf16-true, as float16 needs a gradient scaler",
        lambda word: str(word) not in ("16", "16-mixed", "16-true", "transformer-engine-float16"),
    ),
    "strategy": within(
        "of auto or ddp: each process has whole models, and is started anew",
        lambda word: re.fullmatch("auto|ddp(?!.*(spawn|fork|notebook)).*", str(word)) is not None,
    ),
    "profiler": within(
        "of null, simple or advanced; `fit --profile` is PyTorch's", lambda word: word in (None, "simple", "advanced")
    ),
}
SCALARS = (bool, int, float, str, NoneType)


def check_trainer_keys(config: Config) -> None:
    """Refuse in `trainer:` what is no argument of `lightning.Trainer`, has a wrong type, or other keys decide."""
    hints = get_type_hints(L.Trainer.__init__)
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]

    def check(key: str, value: Any) -> None:
        name = f"trainer.{key}"
        if key not in known:
            raise UserError(name, "an argument of lightning.Trainer", "an unknown one", suggest(key, known))
        if key in OWN_TRAINER_KEYS:
            raise UserError(name, "to be left out: other keys decide it", repr(value), OWN_TRAINER_KEYS[key])
        if type(value) in SCALARS:  # what lists and mappings may hold is Lightning's to say
            as_type(name, value, hints[key])
        if key in TRAINER_LIMITS:
            TRAINER_LIMITS[key](name, value)

    gather(*(partial(check, key, value) for key, value in config.trainer.items()))


def build_trainer(config: Config, folder: RunFolder, profile: bool = False) -> L.Trainer:
    """Build the trainer with checkpoints, tracking, progress and a safe Ctrl-C, and without its logger.

    The logger comes when all checks are done, for making it asks MLflow.
    """
    other = config.trainer.get("profiler")
    if profile and other is not None:
        expected = "trainer.profiler to be null: one hinders the other"
        raise UserError("--profile", expected, repr(other), "Drop one of them.")
    watch = [callbacks.WatchCollapse(config.collapse, config.optim.updates_per_rollout)]
    own = (partial(_own_callback, f"callbacks[{number}]", entry) for number, entry in enumerate(config.callbacks))
    checks = partial(check_trainer_keys, config), partial(_checkpoints, config, folder)
    _, checkpoints, *own_callbacks = gather(*checks, *own)
    chosen: list[L.Callback] = [
        # The first, so that what the others do before a step counts as part of it.
        *([callbacks.ProfileSteps(folder.profile)] if profile else []),
        callbacks.StepSpeed(),
        *([callbacks.EvaluationFigures()] if config.diagnostics.figures else []),
        *checkpoints,
        callbacks.SaveOnInterrupt(folder.last_checkpoint),
        RunRecord(config, folder.config),
        callbacks.KeepPace(config.evaluation.every_n_steps),
        *_diagnostics(config),
        *(watch if config.collapse.action != "off" else []),
    ]  # fmt: skip
    chosen += own_callbacks
    # KeepPace says after which batches.
    when = {"val_check_interval": config.evaluation.every_n_steps, "check_val_every_n_epoch": None}
    return _build(config, chosen, default_root_dir=folder.path, **when)


def _checkpoints(config: Config, folder: RunFolder) -> list[L.Callback]:
    """Save after each evaluation, when the metrics of the step and of the evaluation have been logged.

    A run that is killed and resumed has no gap in its curves. The best comes first, for the last to know of it.
    """
    best = [keeper(config, folder)] if config.checkpoint.keep_best is not None else []
    last = ModelCheckpoint(
        folder.checkpoints, filename=folder.last_checkpoint.stem, enable_version_counter=False, every_n_epochs=1,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    return [*best, last]


def _diagnostics(config: Config) -> list[L.Callback]:
    every = config.diagnostics.every_n_steps
    if not every:
        return []
    several = [callbacks.TeacherGradients(every)] if config.teachers else []
    return [callbacks.StepDiagnostics(every), *several]


def build_evaluation_trainer(config: Config) -> L.Trainer:
    """Build a trainer that measures and writes nothing."""
    return _build(config, [], enable_checkpointing=False)


def check_shares(trainer: L.Trainer, data: L.LightningDataModule) -> None:
    """Refuse a share of the batches, as `trainer.limit_train_batches=0.1`, that is none at all."""
    for kind in ("train", "val", "test"):
        key, batches = f"limit_{kind}_batches", len(getattr(data, f"{kind}_dataloader")())
        share = getattr(trainer, key)
        if isinstance(share, float) and int(share * batches) < 1:
            raise UserError(f"trainer.{key}", f"a share of {batches} that is one batch or more", share, "Raise it.")


def _own_callback(key: str, entry: Any) -> L.Callback:
    """Make a callback of a user's own from its path, or from a mapping of its path and its keywords."""
    given = entry if isinstance(entry, Mapping) else {"path": entry}
    path, kwargs = given.get("path"), given.get("kwargs", {})
    if not (given.keys() <= {"path", "kwargs"} and isinstance(path, str) and isinstance(kwargs, Mapping)):
        expected = "package.module:name, file.py:name or {path: ..., kwargs: {...}}"
        raise UserError(key, expected, repr(entry), "Write e.g. callbacks=[mine.py:MyCallback].")
    callback = call_object(key, path, **kwargs)
    if not isinstance(callback, L.Callback):
        remedy = "Derive it from lightning.Callback."
        raise UserError(key, "a lightning.Callback", f"{path}, which makes a {type(callback).__name__}", remedy)
    return callback


def _build(config: Config, chosen: list[L.Callback], **own: Any) -> L.Trainer:
    check_trainer_keys(config)
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    arguments = defaults | dict(config.trainer)
    own |= {"logger": False, "plugins": [WholeFileIO()], "use_distributed_sampler": False}
    progress = [_progress(config)] if arguments.get("enable_progress_bar", True) else []
    try:
        trainer = L.Trainer(**arguments, **own, callbacks=[*chosen, *progress])
    except Exception as error:  # Lightning has no common class for what it refuses
        raise UserError("trainer", "values that lightning.Trainer accepts", str(error), "Correct them.") from error
    if trainer.world_size > config.data.batch_size:  # found before as many processes start
        expected = f"at most data.batch_size ({config.data.batch_size}) processes, each of which takes a prompt"
        raise UserError("trainer.devices", expected, trainer.world_size, "Lower it, or raise data.batch_size.")
    return trainer


def _progress(config: Config) -> L.Callback:
    if sys.stderr.isatty() or "ipykernel" in sys.modules:  # a notebook shows bars too
        return callbacks.StepProgress()
    return callbacks.StepLines(config.diagnostics.print_every_n_steps)


class WholeFileIO(TorchCheckpointIO):
    """Files of checkpoints that are whole: written beside the old one, then put in its place.

    Lightning writes to the system's temporary folder and moves: a copy where that is another disk, and a run killed
    while it copies has neither the new checkpoint nor the old one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole file or nothing."""
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)
