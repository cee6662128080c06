"""Distil: measure, train, measure again, export and record. Or measure alone.

`train` is the main entry of the package, behind the command `fit`. `evaluate` is behind `validate` and `test`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L

from lit_opd import tracking
from lit_opd.callbacks import StepSpeed
from lit_opd.config import Config, to_yaml
from lit_opd.config.limits import as_type
from lit_opd.data import PromptDataModule
from lit_opd.data.guarded import tell_constant
from lit_opd.errors import RunError, UserError, gather
from lit_opd.evaluation import can_write
from lit_opd.files import replacing, write_file
from lit_opd.measures.intervals import Interval
from lit_opd.models import export_student
from lit_opd.module import DistillationModule
from lit_opd.plugins import calling_parts
from lit_opd.rollout import VllmEngine
from lit_opd.runs import torch_settings
from lit_opd.runs.checkpoints import check_weights, load_weights, read_checkpoint
from lit_opd.runs.folder import RunFolder, check_export
from lit_opd.runs.lightning_trainer import build_evaluation_trainer, build_trainer, check_shares
from lit_opd.runs.model_card import write_card
from lit_opd.runs.prepare import check_row_lengths, name_models, prepare_data
from lit_opd.runs.resuming import changes, check_changes
from lit_opd.stopping import Stopped, as_raised

__all__ = ["Outcome", "Results", "evaluate", "train"]

Results = dict[str, Interval]


@dataclass(frozen=True)
class Outcome:
    """The end of a run: held-out results before, after and of the teacher, and where things lie.

    `perf` holds medians over the steps of this process, and the largest of the peak memory.
    """

    before: Results
    after: Results
    teacher: Results
    steps: int
    perf: dict[str, float]
    checkpoint: Path
    student: Path
    logger: tracking.RunLogger


def train(config: Config, resume: str | None = None, profile: bool = False) -> Outcome:
    """Distil as configured.

    Args:
        config: the run.
        resume: None, `auto` or a checkpoint.
        profile: record where the time of a few steps goes.

    Raises:
        UserError: whatever cannot work; nothing has been written then.
        RunError: a mistake that shows only when there are steps, as in a part of the user's own.
        NonFiniteStepError: a step whose loss or gradient was not finite; a checkpoint has been saved.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been saved, if training had begun.
    """
    as_type("config", config, Config)
    with torch_settings.settled(config):
        return _train(config, resume, profile)


def _train(config: Config, resume: str | None, profile: bool) -> Outcome:
    folder = RunFolder(Path(config.output_dir))
    known = folder.read_notes().get("mlflow_run_id") if resume else None
    (checkpoint, ended), _, trainer, data = gather(
        partial(claim, config, folder, resume),
        partial(tracking.check_tracking, config.tracking.uri, begun=known is not None),
        partial(build_trainer, config, folder, profile),
        partial(prepare, config),
    )
    if ended is not None:
        return ended
    check_shares(trainer, data)
    torch_settings.tell(config, trainer)
    module = DistillationModule.from_config(config)
    check_row_lengths(data, module.scorer)
    if checkpoint is not None:
        check_weights("--resume", module.model, checkpoint)
    module.pair.read()
    if isinstance(module.engine, VllmEngine):
        module.engine.find()
    with folder.held(resume):
        return record(config, folder, trainer, module, data, checkpoint, known)


def claim(config: Config, folder: RunFolder, resume: str | None) -> tuple[Path | None, Outcome | None]:
    """Find the checkpoint to go on from, and what came of the run if it has ended."""
    checkpoint, ended = folder.claim(resume), None
    if checkpoint is not None:
        ended = ended_before(config, folder, checkpoint)
        if ended is None:
            check_changes(config, checkpoint, own=folder.holds(checkpoint))
    check_export(config, folder.student)
    return checkpoint, ended


def record(
    config: Config,
    folder: RunFolder,
    trainer: L.Trainer,
    module: DistillationModule,
    data: PromptDataModule,
    checkpoint: Path | None,
    known: str | None,
) -> Outcome:
    """Begin the MLflow run or find the `known` one, make the run, and record how it ended, as `train` does."""
    logger = tracking.begin_run(config, tags_of(config, module, data), known, folder.path)
    trainer.loggers = logger.loggers
    if trainer.is_global_zero:
        notes = {"mlflow_run_id": logger.run_id, "mlflow_experiment_id": logger.experiment_id, "ended": None}
        notes["dataset_sha256"] = data.dataset_sha256
        folder.write_notes(**notes, **({"before": {}, "teacher": {}} if checkpoint is None else {}))
        write_file(folder.config, to_yaml(config))
        tracking.log_datasets(logger, data)
        tracking.offer_view(logger)
    try:
        with calling_parts(), as_raised():
            return run(config, folder, trainer, module, data, logger, checkpoint)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        logger.end(status)
        if trainer.is_global_zero and known is None and isinstance(error, UserError) and not speed_of(trainer).steps:
            logger.drop()
            raise
        if trainer.is_global_zero:
            with suppress(RunError):  # where the disk is full, which then is what the run ends with
                folder.write_notes(ended=status)
        if isinstance(error, Stopped) and folder.last_checkpoint.is_file():
            error.args = (f"{error}: {folder.last_checkpoint} holds the training so far. Go on with --resume auto.",)
        if isinstance(error, UserError) and speed_of(trainer).steps:
            raise RunError(str(error)) from error  # a mistake of the user leaves nothing behind, and there are steps
        raise


def run(
    config: Config,
    folder: RunFolder,
    trainer: L.Trainer,
    module: DistillationModule,
    data: PromptDataModule,
    logger: tracking.RunLogger,
    checkpoint: Path | None,
) -> Outcome:
    """Measure, train, measure again and export, with everything built, as `train` does."""
    if checkpoint is None:
        measured = measure_before(config, trainer, module, data)
        if trainer.is_global_zero:
            folder.write_notes(**measured)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder.last_checkpoint)  # now: from here on a run that is stopped loses no step
    if module.measured_at != trainer.global_step:
        trainer.validate(module, data, verbose=False)
    notes = folder.read_notes()
    before, teacher = ({k: Interval(*v) for k, v in notes.get(name, {}).items()} for name in ("before", "teacher"))
    after, perf = module.results["val"], speed_of(trainer).typical()
    outcome = Outcome(before, after, teacher, trainer.global_step, perf, folder.last_checkpoint, folder.student, logger)
    if trainer.is_global_zero:
        close_run(config, folder, module, data, outcome)
    return outcome


def speed_of(trainer: L.Trainer) -> StepSpeed:
    """Find the callback that times the steps of this process."""
    (speed,) = (callback for callback in trainer.callbacks if isinstance(callback, StepSpeed))  # type: ignore[attr-defined]
    return speed


def ended_before(config: Config, folder: RunFolder, checkpoint: Path) -> Outcome | None:
    """Read how the run of a folder ended, if it did and the configuration does not tell it to go on."""
    notes = folder.read_notes()
    if not (notes.get("ended") == "FINISHED" and folder.summary.is_file() and folder.holds(checkpoint)):
        return None
    if any(key.startswith("trainer") or key == "collapse.action" for key in changes(folder.config, config)):
        return None
    found = json.loads(folder.summary.read_text())
    results = {name: {k: Interval(**v) for k, v in found[name].items()} for name in ("before", "after", "teacher")}
    where: Any = SimpleNamespace(run_id=notes["mlflow_run_id"], experiment_id=notes["mlflow_experiment_id"])
    checkpoint, student = folder.last_checkpoint, folder.student
    return Outcome(**results, steps=found["steps"], perf=found["perf"], checkpoint=checkpoint, student=student,
                   logger=where)  # fmt: skip


def measure_before(
    config: Config, trainer: L.Trainer, module: DistillationModule, data: PromptDataModule
) -> dict[str, Results]:
    """Measure the student before training, and the teacher itself where `evaluation.teacher` asks for it."""
    if config.evaluation.teacher and can_write(module.scorer):
        with module.judging_teacher():
            trainer.validate(module, data, verbose=False)
        tell_constant(module.results["teacher"])
    trainer.validate(module, data, verbose=False)  # the last, so that the last evaluation of a run is the student's
    return {"before": module.results["val"], "teacher": module.results.get("teacher", {})}


def close_run(
    config: Config, folder: RunFolder, module: DistillationModule, data: PromptDataModule, outcome: Outcome
) -> None:
    """Export the student, write the results, prompt by prompt and summed up, and end the MLflow run."""
    with replacing(folder.student) as part:
        export_student(module.student, part)
    found = module.evaluation.per_prompt
    hashes = [data.validation_hashes[number] for number in found.numbers]
    write_file(folder.prompts, json.dumps({"prompts": hashes, "sums": found.sums, "weights": found.weights}))
    summary = _as_json(outcome) | {"paths": [str(verdict) for verdict in module.verdicts.values()]}
    write_file(folder.summary, json.dumps(summary, indent=2))
    write_card(folder.student, config, folder, outcome.steps)
    tracking.log_files(outcome.logger, {file.name: file.read_bytes() for file in (folder.prompts, folder.summary)})
    tracking.log_medians(outcome.logger, outcome.perf, outcome.steps)
    tracking.log_student(outcome.logger, folder.student, outcome.steps, data)
    outcome.logger.end("FINISHED")
    folder.write_notes(ended="FINISHED")


def evaluate(config: Config, checkpoint: str | None, stage: str) -> Results:
    """Measure the yardsticks of the configured student, or of a checkpoint of it, at a stage, and write nothing.

    The stage is `validate` or `test`. Whatever cannot work is a `UserError`.
    """
    as_type("config", config, Config)
    with torch_settings.settled(config):
        return _evaluate(config, checkpoint, stage)


def _evaluate(config: Config, checkpoint: str | None, stage: str) -> Results:
    if checkpoint is not None:
        read_checkpoint("--checkpoint", Path(checkpoint))
    trainer, data = gather(partial(build_evaluation_trainer, config), partial(prepare, config))
    check_shares(trainer, data)
    torch_settings.tell(config, trainer)
    module = DistillationModule.from_config(config)
    check_row_lengths(data, module.scorer)
    if checkpoint is not None:
        load_weights("--checkpoint", module.model, Path(checkpoint))
    loop = trainer.validate if stage == "validate" else trainer.test
    with as_raised():
        loop(module, data, verbose=False)
    return module.results["val" if stage == "validate" else "test"]


def prepare(config: Config) -> PromptDataModule:
    """Seed every library, then check what needs no weights and load the data."""
    L.seed_everything(config.seed, verbose=False)
    return prepare_data(config)


def tags_of(config: Config, module: DistillationModule, data: PromptDataModule) -> dict[str, str]:
    """Collect the MLflow tags of a run."""
    return {
        "estimator": config.estimator.name,
        "family": module.estimator.spec.family,
        "seed": str(config.seed),
        "dataset_sha256": data.dataset_sha256,
        **name_models(config, module.pair),
        **tracking.git_sha(),
    }


def _as_json(outcome: Outcome) -> dict[str, Any]:
    values = {k: v for k, v in vars(outcome).items() if k != "logger"}
    for name in ("before", "after", "teacher"):
        values[name] = {metric: interval._asdict() for metric, interval in getattr(outcome, name).items()}
    return values | {"checkpoint": str(outcome.checkpoint), "student": str(outcome.student)}
