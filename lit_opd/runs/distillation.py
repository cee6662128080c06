"""Distil: measure, train, measure again, export and record. Or measure alone.

`train` is the main entry of the package, behind the command `fit`. `evaluate` is behind `validate` and `test`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

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
from lit_opd.rollout import as_jsonl
from lit_opd.runs import torch_settings
from lit_opd.runs.assembly import Assembly, assemble, prepare
from lit_opd.runs.best import go_back, note_last
from lit_opd.runs.checkpoints import load_weights, read_checkpoint
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.lightning_trainer import build_evaluation_trainer, check_shares
from lit_opd.runs.outcome import Outcome, Results, as_json
from lit_opd.runs.prepare import check_row_lengths, name_models
from lit_opd.stopping import Stopped, as_raised

__all__ = ["Announce", "Outcome", "Results", "evaluate", "train"]

Announce = Callable[[Config, Assembly, tracking.RunLogger], None]


def train(
    config: Config, resume: str | None = None, profile: bool = False, announce: Announce = lambda *_: None
) -> Outcome:
    """Distil as configured.

    Args:
        config: the run.
        resume: None, `auto` or a checkpoint.
        profile: record where the time of a few steps goes.
        announce: called in the first process with the configuration, the parts of the run and its logger, when all is
            checked and before anything is measured.

    Raises:
        UserError: whatever cannot work; nothing has been written then.
        RunError: a mistake that shows only when there are steps, as in a part of the user's own.
        NonFiniteStepError: a step whose loss or gradient was not finite; a checkpoint has been saved.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been saved, if training had begun.
    """
    as_type("config", config, Config)
    with torch_settings.settled(config):
        return _train(config, resume, profile, announce)


def _train(config: Config, resume: str | None, profile: bool, announce: Announce) -> Outcome:
    made = assemble(config, resume, profile)
    if isinstance(made, Outcome):
        return made
    with made.folder.held(resume):
        return record(config, made, announce)


def record(config: Config, made: Assembly, announce: Announce) -> Outcome:
    """Begin the MLflow run or find the `known` one, make the run, and record how it ended, as `train` does."""
    folder, trainer, module, data, checkpoint, known = made
    trainer.logger = logger = tracking.begin_run(config, tags_of(config, module, data), known, folder.path)
    if trainer.is_global_zero:
        notes = {"mlflow_run_id": logger.run_id, "mlflow_experiment_id": logger.experiment_id, "ended": None}
        folder.write_notes(**notes, **({"before": {}, "teacher": {}} if checkpoint is None else {}))
        write_file(folder.config, to_yaml(config))
        tracking.log_datasets(logger, data)
        tracking.offer_view(logger)
        announce(config, made, logger)
    try:
        with calling_parts(), as_raised():
            return run(config, made, logger)
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


def run(config: Config, made: Assembly, logger: tracking.RunLogger) -> Outcome:
    """Measure, train, measure again and export, with everything built, as `train` does."""
    folder, trainer, module, data, checkpoint, _ = made
    if checkpoint is None:
        measured = measure_before(config, trainer, module, data)
        if trainer.is_global_zero:
            folder.write_notes(**measured)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder.last_checkpoint)  # now: from here on a run that is stopped loses no step
    if module.measured_at != trainer.global_step:
        trainer.validate(module, data, verbose=False)
        note_last(config, folder, trainer, module)
    exported = go_back(config, folder, trainer, module, data)
    notes = folder.read_notes()
    before, teacher = ({k: Interval(*v) for k, v in notes.get(name, {}).items()} for name in ("before", "teacher"))
    after, perf = module.results["val" if exported is None else "test"], speed_of(trainer).typical()
    checkpoint = folder.last_checkpoint if exported is None else folder.best_checkpoint
    outcome = Outcome(before, after, teacher, trainer.global_step, perf, checkpoint, folder.student, logger, exported)
    if trainer.is_global_zero:
        close_run(folder, module, data, outcome)
    return outcome


def speed_of(trainer: L.Trainer) -> StepSpeed:
    """Find the callback that times the steps of this process."""
    (speed,) = (callback for callback in trainer.callbacks if isinstance(callback, StepSpeed))  # type: ignore[attr-defined]
    return speed


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


def close_run(folder: RunFolder, module: DistillationModule, data: PromptDataModule, outcome: Outcome) -> None:
    """Export the student, write the results, prompt by prompt and summed up, and end the MLflow run."""
    with replacing(folder.student) as part:
        export_student(module.student, part)
    found = module.evaluation.per_prompt
    hashes = [data.validation_hashes[number] for number in found.numbers]
    write_file(folder.prompts, json.dumps({"prompts": hashes, "sums": found.sums, "weights": found.weights}))
    write_file(folder.completions, as_jsonl(module.evaluation.transcripts))
    summary = as_json(outcome) | {"paths": [str(verdict) for verdict in module.verdicts.values()]}
    write_file(folder.summary, json.dumps(summary, indent=2))
    tracking.log_files(outcome.logger, {file.name: file.read_bytes() for file in (folder.prompts, folder.summary)})
    tracking.log_medians(outcome.logger, outcome.perf, outcome.steps)
    tracking.log_student(outcome.logger, folder.student, outcome.exported_step or outcome.steps, data)
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
