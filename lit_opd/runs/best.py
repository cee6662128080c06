"""Keep the checkpoint of a run's best evaluation by a yardstick, and go back to it where the run has collapsed.

`build_trainer` puts the keeper among the callbacks. `train` calls the rest when Lightning has ended.
"""

from __future__ import annotations

import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_opd.callbacks import WatchCollapse
from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.errors import LintWarning, UserError, suggest
from lit_opd.measures.custom import load_measures
from lit_opd.measures.table import PASS_AT, describe, names_of
from lit_opd.models import OF_TOKENS
from lit_opd.module import DistillationModule
from lit_opd.runs.checkpoints import load_weights, read_checkpoint
from lit_opd.runs.folder import RunFolder
from lit_opd.teachers import FULL, Scorer
from lit_opd.tracking import log_tag, logger_of

__all__ = ["check_measured", "go_back", "keeper", "note_last"]

KEY = "checkpoint.keep_best"


def keeper(config: Config, folder: RunFolder) -> ModelCheckpoint:
    """Make the callback that keeps the best checkpoint by `checkpoint.keep_best`.

    Raises:
        UserError: the key names no yardstick that has a good direction, or one that needs a verifier where none is.
    """
    load_measures(config.evaluation.measures)
    names = [*names_of("token", "completion"), *(f"{PASS_AT}{k}" for k in config.evaluation.pass_at if k > 1)]
    known = [name for name in names if describe(name).better]
    name = str(config.checkpoint.keep_best)
    if name not in known:
        raise UserError(KEY, "null, or a yardstick of which less or more is better", repr(name), suggest(name, known))
    if describe(name).of == "completion" and config.data.verifier is None:
        raise UserError(KEY, "a yardstick that is measured", f"{name!r} without data.verifier", "Set data.verifier.")
    return ModelCheckpoint(
        folder.checkpoints, filename=folder.best_checkpoint.stem, monitor=f"val/{name}",
        mode="min" if describe(name).better == "lower" else "max", enable_version_counter=False,
        every_n_epochs=1, save_on_train_epoch_end=False,
    )  # fmt: skip


def check_measured(config: Config, scorer: Scorer | None) -> None:
    """Refuse a yardstick that needs the whole distributions of a teacher which does not give them."""
    name = config.checkpoint.keep_best
    if name is None or scorer is None or FULL in scorer.gives:
        return
    if describe(name).of == "token" and name not in OF_TOKENS:
        expected = "a yardstick that is measured: this teacher gives no whole distributions"
        raise UserError(KEY, expected, repr(name), "Set it to teacher_nll, or to accuracy.")


def note_last(config: Config, folder: RunFolder, trainer: L.Trainer, module: DistillationModule) -> None:
    """Keep the last step's checkpoint where the evaluation that came after training is the best of all."""
    name = config.checkpoint.keep_best
    if name is None:
        return
    (best,) = (c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor)  # type: ignore[attr-defined]
    if best.check_monitor_top_k(trainer, torch.tensor(module.results["val"][name].mean)):
        trainer.save_checkpoint(folder.best_checkpoint)


def go_back(
    config: Config, folder: RunFolder, trainer: L.Trainer, module: DistillationModule, data: PromptDataModule
) -> int | None:
    """Put the best weights into the student of a run that was stopped for collapse, and measure them as `test/*`.

    Returns:
        The step they are of, None where the student stays as it is.
    """
    watches = (c for c in trainer.callbacks if isinstance(c, WatchCollapse))  # type: ignore[attr-defined]
    if not any(watch.stopped for watch in watches):
        return None
    if config.checkpoint.keep_best is None:
        told = f"the student of step {trainer.global_step} is exported as it is"
        hint = f"Set {KEY}=reverse_kl to have the best one kept and exported."
        warnings.warn(f"the run was stopped for collapse: {told}. {hint}", LintWarning, stacklevel=2)
        return None
    step = int(read_checkpoint(KEY, folder.best_checkpoint)["global_step"])
    if step == trainer.global_step:
        return None
    log_tag(logger_of(trainer), "exported", f"step {step}, the best by {config.checkpoint.keep_best}")
    load_weights(KEY, module.model, folder.best_checkpoint)
    trainer.test(module, data, verbose=False)
    return step
