"""Check everything about a run that can be known before weights load, and load its data.

Called by `train` and `evaluate`, and by the experiments of `lab/`.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from lit_opd import estimators, linter
from lit_opd.config import Config, OptimConfig, StudentConfig, TeacherConfig
from lit_opd.data import PromptDataModule
from lit_opd.data.schedule import check_data, read_schedule
from lit_opd.errors import LintWarning, UserError, gather
from lit_opd.models import Pair, context_length, load_tokenizer, named_groups, read_model_config, token_ids
from lit_opd.optim import build_optimizer, build_scheduler, rehearsal_device
from lit_opd.runs.first_look import first_look, local_teachers
from lit_opd.runs.lightning_trainer import check_trainer_keys
from lit_opd.runs.verdicts import FAIL, PASS, Finding
from lit_opd.teachers import Scorer, TextSpans, check_share, templates
from lit_opd.types import Need

__all__ = [
    "check_kinds", "check_optimizer", "check_row_lengths", "check_weight_files", "name_models", "prepare_data",
]  # fmt: skip

PROBED = 64  # rows of the data that tell how two tokenizers agree


def prepare_data(config: Config, tell: bool = True) -> PromptDataModule:
    """Check all that shows without weights, load and encode the data, and `tell` what `first_look` finds."""
    return gather(partial(_check_estimator, config), partial(_check_steps, config), partial(_load, config, tell))[-1]


def _check_steps(config: Config) -> None:
    try:
        check_optimizer(config.optim)
    except UserError as error:
        if error.key == "optim":  # a schedule may take its length from the trainer, whose mistake it is then
            check_trainer_keys(config)
        raise


def _check_estimator(config: Config) -> None:
    estimator = estimators.build_from(config.estimator)
    if Need.REWARDS in estimator.needs and config.data.verifier is None:
        raise UserError("data.verifier", f"one: {estimator.spec.name!r} learns from rewards", "null", "Set it.")
    updates, prompts = config.optim.updates_per_rollout, config.data.batch_size
    if Need.GROUPS in estimator.needs and updates > prompts:
        name = estimator.spec.name
        expected = f"at most data.batch_size ({prompts}): {name!r} keeps the completions of a prompt together"
        raise UserError("optim.updates_per_rollout", expected, updates, "Lower it or raise data.batch_size.")
    sections = config.rollout, config.optim, config.student, config.teachers or config.teacher
    linter.check(estimator, *sections, masked_tokens=config.estimator.masked_tokens, allow=config.lint.allow)


def _load(config: Config, tell: bool) -> PromptDataModule:
    others: dict[str, Any] = {key: section for key, section in local_teachers(config).items() if section.path}
    if config.reference.path is not None and _wants_reference(config):
        others["reference"] = config.reference
    (context, tokenizer), *contexts = gather(
        lambda: (_context_length(config.student, "student"), load_tokenizer(config.student, "student")),
        *(partial(_context_length, section, key) for key, section in others.items()),
    )
    contexts.append(context)
    masked = token_ids(tokenizer, config.estimator.masked_tokens, "estimator.masked_tokens")
    named_groups(config.estimator.merged_stops, tokenizer, masked)
    if tell:
        _tell(config, first_look(config, tokenizer))
    evaluated = config.evaluation.max_new_tokens or 0
    data = PromptDataModule(
        config.data, tokenizer=tokenizer, seed=config.seed,
        evaluation_batch_size=config.evaluation.batch_size,
        context_length=min((c for c in contexts if c is not None), default=None),
        max_new_tokens=max(config.rollout.max_new_tokens, evaluated),
        shown=templates(config.teachers or config.teacher), teachers=[*config.teachers],
    )  # fmt: skip
    data.setup("fit")
    check_data(read_schedule(config.teachers_schedule, config.teachers), data)
    if config.teacher.least_aligned is not None and not config.teachers:
        _check_share(data, config.teacher.least_aligned)
    if config.rollout.student_share < 1 and config.rollout.demonstrations == "data":
        data.demonstrations(data.train_prompts.rows)  # all of which have one, or it says so
    return data


def check_row_lengths(data: PromptDataModule, scorer: Scorer | None) -> None:
    """Refuse prompts that leave too little of the rows that a teacher takes, which a server tells when it is met."""
    if scorer is not None and scorer.longest is not None:
        known = (scorer.longest, data.context_length)
        data.context_length = min(length for length in known if length is not None)
        data.setup("fit")


def _check_share(data: PromptDataModule, least: float) -> None:
    """Hold the data's own texts to the share of exactly aligned tokens that the run accepts."""
    assert data.shown is not None
    rows, columns = data.train_prompts.rows[:PROBED], (data.config.prompt_column, data.config.answer_column)
    texts = [row[name] for row in rows for name in columns if name and isinstance(row.get(name), str)]
    if texts:
        share = TextSpans(data.tokenizer, data.shown["teacher"]["tokenizer"]).share(texts)
        check_share(share, least, f"the first {len(rows)} rows of the data")


def _wants_reference(config: Config) -> bool:
    with suppress(UserError):  # told by `_check_estimator`
        return Need.REFERENCE in estimators.build_from(config.estimator).needs
    return False


def check_kinds(config: Config, command: str, *kinds: str) -> None:
    """Refuse teachers of other kinds, for a command that reads their whole distributions."""
    teachers = {f"teachers.{name}": one for name, one in config.teachers.items()} or {"teacher": config.teacher}
    for key, teacher in teachers.items():
        if teacher.kind not in kinds:
            others = "".join(f" (or {kind})" for kind in kinds[1:])
            expected = f"{kinds[0]} for {command}{others}, which reads the teacher's whole distributions"
            remedy = f"Name a model folder in {key}.path, or run validate, which measures what this teacher gives."
            raise UserError(f"{key}.kind", expected, teacher.kind, remedy)
        if teacher.least_aligned is not None:
            expected = f"null for {command}, which reads the teacher's whole distributions over the student's tokens"
            raise UserError(f"{key}.least_aligned", expected, teacher.least_aligned, "Drop it.")


def name_models(config: Config, pair: Pair) -> dict[str, str]:
    """Name the models of a run for its tags: several teachers, and one that is no folder, by their kinds."""
    kinds = ", ".join(f"{name}: {one.kind}" for name, one in config.teachers.items()) or config.teacher.kind
    return {"teacher": kinds} | pair.names()


def check_optimizer(config: OptimConfig) -> None:
    """Rehearse a step of optimizer and scheduler on a matrix and a vector, and refuse those that cannot make it."""
    try:
        device = rehearsal_device(config)
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in ((1, 1), (1,))]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer(config, parameters)
        scheduler = build_scheduler(replace(config, warmup_steps=0), optimizer)  # the one after warm-up makes the step
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    except UserError:
        raise
    except Exception as error:  # every one of them has its own way to refuse
        expected = f"{config.name} and scheduler {config.scheduler} to make a step"
        raise UserError("optim", expected, f"{type(error).__name__}: {error}", "Correct their keywords.") from error


def check_weight_files(config: StudentConfig | TeacherConfig, key: str) -> None:
    """Refuse a local model folder without weights, or with a file of them whose header cannot be read."""
    folder = Path(config.path).expanduser()
    if config.gguf_file is not None or not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        remedy = "Name the folder that save_pretrained wrote."
        raise UserError(f"{key}.path", "a model folder with weights", f"none in {config.path!r}", remedy)
    for file in files:
        try:
            zipped, old = is_zipfile(file), file.suffix == ".bin"
            held = torch.load(file, "meta", mmap=zipped, weights_only=True) if old else safe_open(file, framework="pt")
            held.keys()  # a list of weights has none
        except Exception as error:  # pickle, zip and safetensors have no common class for it
            # torch's own words advise to load what may run code.
            told = error if isinstance(error, SafetensorError | OSError) else type(error).__name__
            remedy = "The file is damaged: copy or download it again."
            raise UserError(f"{key}.path", "readable weights", f"{file}: {told}", remedy) from error


def _tell(config: Config, looks: dict[str, Finding]) -> None:
    """Warn of what `first_look` found, and refuse demonstrations that could not be ended."""
    ends, wanted = looks["stop tokens"], config.rollout.demonstrated and config.rollout.demonstrations == "data"
    if ends.verdict == FAIL and wanted:
        raise UserError("rollout.demonstrations", "a student that ends", "none", ends.fix)
    for item, finding in looks.items():
        if finding.verdict != PASS:
            warnings.warn(f"{item}: {finding.found}. {finding.fix}", LintWarning, stacklevel=3)


def _context_length(section: Any, key: str) -> int | None:
    found = read_model_config(section, key).get_text_config()
    check_weight_files(section, key)
    return context_length(found)
