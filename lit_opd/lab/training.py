"""The main experiment: measure, distil, measure again, export, and say what came of it."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from lit_opd import estimators
from lit_opd.callbacks import SaveOnInterrupt, StepProgress
from lit_opd.config import Config, to_yaml
from lit_opd.data import PromptDataModule
from lit_opd.errors import UserError, suggest
from lit_opd.lab.export import export_student
from lit_opd.lab.folder import RunFolder, read_checkpoint
from lit_opd.metrics import Interval
from lit_opd.models import load_tokenizer, read_model_config
from lit_opd.module import DistillationModule
from lit_opd.tracking import RunLogger, RunRecord, build_logger, check_tracking, git_sha

__all__ = ["Outcome", "evaluate", "train"]

# Built here from other keys of the configuration; a second source would contradict it.
OWN_TRAINER_KEYS = ("logger", "callbacks", "default_root_dir", "use_distributed_sampler", "val_check_interval",
                    "check_val_every_n_epoch", "gradient_clip_val", "accumulate_grad_batches")  # fmt: skip

Results = dict[str, Interval]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: held-out results before, after and of the teacher, and where things lie."""

    before: Results
    after: Results
    teacher: Results
    steps: int
    perf: dict[str, float]
    checkpoint: Path
    student: Path
    logger: RunLogger


def train(config: Config, resume: str | None = None) -> Outcome:
    """Distil as configured.

    Args:
        config: the run.
        resume: None, `auto` or a checkpoint.

    Raises:
        UserError: whatever cannot work; nothing has been written then.
        NonFiniteStepError: a step whose loss or gradient was not finite; a checkpoint has been saved.
    """
    folder = RunFolder(Path(config.output_dir))
    check_trainer_keys(config)
    checkpoint = folder.claim(resume)
    if checkpoint is not None:
        read_checkpoint(checkpoint)
    check_tracking(config.tracking.uri)
    module, data = build(config)
    notes = folder.read_notes() if checkpoint is not None else {}
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(to_yaml(config))
    logger = build_logger(config, tags_of(config, module, data), notes.get("mlflow_run_id"))
    trainer = build_trainer(config, folder, logger)
    try:
        return run(config, folder, trainer, module, data, logger, checkpoint)
    except Exception:
        if trainer.is_global_zero and logger.run_id is not None:
            logger.experiment.set_terminated(logger.run_id, "FAILED")
        raise


def run(
    config: Config,
    folder: RunFolder,
    trainer: L.Trainer,
    module: DistillationModule,
    data: PromptDataModule,
    logger: RunLogger,
    checkpoint: Path | None,
) -> Outcome:
    """Evaluations, training and export with everything built; see `train`."""
    notes = folder.read_notes() if checkpoint is not None else {}
    if checkpoint is None:
        trainer.validate(module, data, verbose=False)
        notes = {"before": module.results["val"], "teacher": {}}
        if config.evaluation.teacher:
            with module.judging_teacher():
                trainer.validate(module, data, verbose=False)
            notes["teacher"] = module.results["teacher"]
        if trainer.is_global_zero:
            folder.write_notes(mlflow_run_id=logger.run_id, **notes)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    perf = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("perf/")}
    if module.measured_at != trainer.global_step:
        trainer.validate(module, data, verbose=False)
    before, teacher = ({k: Interval(*v) for k, v in notes.get(name, {}).items()} for name in ("before", "teacher"))
    outcome = Outcome(before, module.results["val"], teacher, trainer.global_step, perf, folder.last_checkpoint,
                      folder.student, logger)  # fmt: skip
    if trainer.is_global_zero:
        trainer.save_checkpoint(folder.last_checkpoint)
        export_student(module.student, folder.student)
        folder.summary.write_text(json.dumps(_as_json(outcome), indent=2))
        logger.experiment.log_artifact(logger.run_id, str(folder.summary))
        logger.experiment.set_terminated(logger.run_id, "FINISHED")
    return outcome


def evaluate(config: Config, checkpoint: str | None, stage: str) -> Results:
    """Measure the yardsticks of the configured student, or of a checkpoint of it.

    Args:
        config: the run.
        checkpoint: path, or None for the student as it lies.
        stage: `validate` or `test`.
    """
    check_trainer_keys(config)
    if checkpoint is not None:
        read_checkpoint(Path(checkpoint))
    module, data = build(config)
    trainer = L.Trainer(**trainer_arguments(config), logger=False, use_distributed_sampler=False)
    loop = trainer.validate if stage == "validate" else trainer.test
    loop(module, data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return module.results["val" if stage == "validate" else "test"]


def build(config: Config) -> tuple[DistillationModule, PromptDataModule]:
    """Module and data; everything that needs no weights is checked before they load."""
    L.seed_everything(config.seed, verbose=False)
    estimators.build(config.estimator.name, **config.estimator.kwargs)
    for key, section in (("student", config.student), ("teacher", config.teacher)):
        read_model_config(section, key)
    positions = read_model_config(config.student, "student").get_text_config().max_position_embeddings
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    data = PromptDataModule(
        config.data, tokenizer=load_tokenizer(config.student, "student"), seed=config.seed,
        evaluation_batch_size=config.evaluation.batch_size, context_length=positions, max_new_tokens=longest,
    )  # fmt: skip
    data.setup("fit")
    return DistillationModule.from_config(config), data


def check_trainer_keys(config: Config) -> None:
    """Compare `trainer:` with the signature of `lightning.Trainer`.

    Raises:
        UserError: an argument it does not take, or one that another key of the configuration decides.
    """
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
    for key in config.trainer:
        if key not in known:
            raise UserError(f"trainer.{key}", "an argument of lightning.Trainer", "an unknown one", suggest(key, known))
        if key in OWN_TRAINER_KEYS:
            remedy = "See evaluation.every_n_steps, optim.clip_norm, optim.micro_batch_tokens and tracking."
            raise UserError(f"trainer.{key}", "to be left out: other keys decide it", "a value", remedy)


def trainer_arguments(config: Config) -> dict[str, Any]:
    """The user's trainer arguments over this package's defaults."""
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return defaults | dict(config.trainer)


def build_trainer(config: Config, folder: RunFolder, logger: RunLogger) -> L.Trainer:
    """The trainer with checkpoints, tracking, progress and a safe Ctrl-C."""
    arguments = trainer_arguments(config)
    every = config.evaluation.every_n_steps
    callbacks: list[L.Callback] = [
        ModelCheckpoint(folder.checkpoints, filename=folder.last_checkpoint.stem, enable_version_counter=False,
                        every_n_train_steps=every * config.optim.updates_per_rollout),
        SaveOnInterrupt(folder.last_checkpoint),
        RunRecord(config, folder.config),
        LearningRateMonitor(logging_interval="step"),
    ]  # fmt: skip
    if arguments.get("enable_progress_bar", True):
        callbacks.append(StepProgress())
    try:
        return L.Trainer(
            **arguments, logger=logger, callbacks=callbacks, default_root_dir=folder.path,
            use_distributed_sampler=False, val_check_interval=every, check_val_every_n_epoch=None,
        )  # fmt: skip
    except (TypeError, ValueError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise UserError("trainer", "arguments that lightning.Trainer accepts", str(error), "Correct them.") from error


def tags_of(config: Config, module: DistillationModule, data: PromptDataModule) -> dict[str, str]:
    """The MLflow tags of a run."""
    return {
        "estimator": config.estimator.name,
        "family": module.estimator.spec.family,
        "seed": str(config.seed),
        "dataset_sha256": data.dataset_sha256,
        **module.pair.names(),
        **git_sha(),
    }


def _as_json(outcome: Outcome) -> dict[str, Any]:
    values = {k: v for k, v in asdict(outcome).items() if k != "logger"}
    for name in ("before", "after", "teacher"):
        values[name] = {metric: interval._asdict() for metric, interval in getattr(outcome, name).items()}
    return values | {"checkpoint": str(outcome.checkpoint), "student": str(outcome.student)}
