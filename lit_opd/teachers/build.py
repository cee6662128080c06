"""Make the scorers of a run: the teacher that a configuration or a caller names, and a reference where one is asked.

Called by the module before weights load, to refuse what the teacher cannot give, and once the device is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lit_opd.config import RolloutConfig, StudentConfig, TeacherConfig
from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.models import Pair, context_length, load_tokenizer
from lit_opd.plugins import call_object
from lit_opd.teachers.aligned import AlignedScorer, check_spans
from lit_opd.teachers.combined import check_product
from lit_opd.teachers.frozen import LocalScorer
from lit_opd.teachers.routed import RoutedScorer
from lit_opd.teachers.scorer import FULL, MERGED, SUPPORT, TOKEN, Scorer, wanted_by
from lit_opd.teachers.served import ServedScorer
from lit_opd.teachers.spans import TextSpans
from lit_opd.types import Need

__all__ = ["build_scorers", "check_gives", "in_process", "own_scorer", "templates"]

# Registered estimators that ask for no more than each kind of score.
NEAREST = {FULL: "full_vocab", SUPPORT: "teacher_topk", TOKEN: "token"}


def own_scorer(teacher: Any, student: Any, tokenizer: Any = None, combined: str = "mixture") -> Scorer | None:
    """Find the teacher that is not a model in this process, or None where it is one.

    Args:
        teacher: a scorer, a section whose `kind` names one by path, or a model, a path or a section of a local one.
            Several of these by name are one scorer.
        student: a path, a section or a model.
        tokenizer: the student's, by default read from its folder: it is handed, with the section, to what `kind` names.
        combined: `mixture` or `product`, of several teachers of one row.

    Raises:
        UserError: what `kind` names cannot be imported or called, or makes no scorer.
    """
    if isinstance(teacher, Mapping):
        return RoutedScorer({name: _one_of(name, one, student, tokenizer) for name, one in teacher.items()}, combined)
    if isinstance(teacher, Scorer):
        return teacher
    aligns = isinstance(teacher, TeacherConfig) and teacher.least_aligned is not None
    if not isinstance(teacher, TeacherConfig) or teacher.kind in ("local", "student") and not aligns:
        return None
    if tokenizer is None and not isinstance(student, nn.Module):
        tokenizer = load_tokenizer(StudentConfig(path=student) if isinstance(student, str) else student, "student")
    if not aligns:
        return _elsewhere(teacher, tokenizer)
    spans = TextSpans(tokenizer, load_tokenizer(teacher, "teacher"))
    inner = None if teacher.kind == "local" else _elsewhere(teacher, spans.teacher)
    return AlignedScorer(spans, float(teacher.least_aligned or 0), inner)


def _elsewhere(teacher: TeacherConfig, tokenizer: Any) -> Scorer:
    """Make the scorer of a teacher that is no model in this process, which is handed the tokenizer it is scored in."""
    if teacher.kind == "served":
        return ServedScorer(teacher, tokenizer)
    scorer = call_object("teacher.kind", teacher.kind, teacher, tokenizer)
    if not isinstance(scorer, Scorer):
        expected = f"{teacher.kind} to make a scorer, with name, gives and score"
        raise UserError("teacher.kind", expected, type(scorer).__name__, "Derive it from lit_opd.teachers.Scorer.")
    return scorer


def _one_of(name: str, teacher: Any, student: Any, tokenizer: Any) -> Scorer | None:
    """Find one of several teachers that is not a model in this process, under its name."""
    try:
        scorer = own_scorer(teacher, student, tokenizer)
    except UserError as error:
        first, dot, rest = error.key.partition(".")
        if first != "teacher":
            raise
        raise UserError(f"teachers.{name}{dot}{rest}", error.expected, error.found, error.remedy) from error
    if isinstance(scorer, AlignedScorer):
        expected = "a teacher that reads the student's tokens, as one of several"
        raise UserError(f"teachers.{name}", expected, "one with another tokenizer", "Make it the only teacher.")
    if scorer is not None and isinstance(teacher, TeacherConfig):
        scorer.name = f"teachers.{name}"
    return scorer


def check_gives(scorer: Scorer, estimator: BoundEstimator, rollout: RolloutConfig, merges: bool = False) -> None:
    """Compare what a scorer gives with what a run, which may merge tokens, asks of its teacher.

    Raises:
        UserError: the estimator or merging needs more, demonstrations are to be sampled by what can only score, or a
            product of teachers has another meaning for the estimator.
    """
    missing = wanted_by(estimator).kinds - scorer.gives
    if missing:
        best = next(kind for kind in NEAREST if kind in scorer.gives)
        expected = f"one that asks this teacher for no more than {', '.join(sorted(scorer.gives))}"
        found = f"{estimator.spec.name!r}, which needs {', '.join(sorted(missing))}"
        raise UserError("estimator.name", expected, found, f"Set estimator.name={NEAREST[best]}.")
    if isinstance(scorer, RoutedScorer) and scorer.combined == "product":
        check_product(estimator)
    if isinstance(scorer, AlignedScorer):
        check_spans(estimator)
    if merges and MERGED not in scorer.gives:
        expected = "null: this teacher does not tell the probability of every token of a group"
        remedy = "local teachers"
        if isinstance(scorer, RoutedScorer) and scorer.combined == "product":
            expected, remedy = "null: a product of merged tokens is not the merged product", "teachers_combined=mixture"
        raise UserError("estimator.merged_stops", expected, "groups", f"Set it, or take {remedy}.")
    if rollout.demonstrated and rollout.demonstrations == "teacher":
        expected = "data: this teacher scores, and cannot sample"
        raise UserError("rollout.demonstrations", expected, "teacher", "Set it, or let the student write everything.")


def in_process(teacher: Any, own: Scorer | None) -> Any:
    """Select the teacher that is a model in this process, or those by name of several, given what is its `own` scorer.

    It is None where there is none.
    """
    if not isinstance(own, RoutedScorer):
        return teacher if own is None or isinstance(own, AlignedScorer) and own.inner is None else None
    return {name: one for name, one in teacher.items() if own.scorers[name] is None}


def templates(teacher: Any) -> dict[str, Any]:
    """List what teachers read instead of the prompt, by the name of their scorer, with a tokenizer of their own."""
    if isinstance(teacher, TeacherConfig) and teacher.least_aligned is not None:
        return {"teacher": {**teacher.shown, "tokenizer": load_tokenizer(teacher, "teacher")}}
    several = isinstance(teacher, Mapping)
    named = {f"teachers.{name}": one for name, one in teacher.items()} if several else {"teacher": teacher}
    return {name: one.shown for name, one in named.items() if isinstance(one, TeacherConfig) and one.shown}


def build_scorers(
    pair: Pair, own: Scorer | None, estimator: BoundEstimator, rows: int, device: torch.device
) -> dict[str, Scorer]:
    """Load the frozen models that score, unless the teacher is its `own` scorer, and name every scorer by its role."""
    if isinstance(own, RoutedScorer):
        own = own.lending(partial(_lent, pair, device, rows), rows)
    if isinstance(own, AlignedScorer) and own.inner is None:
        model = pair.load("teacher", device)
        fewer = max(1, rows * pair.vocabulary // model.vocabulary)  # of a larger vocabulary, in the same memory
        own = own.reading(LocalScorer(model, fewer), context_length(model.config.get_text_config()))
    teacher = own or LocalScorer(pair.load("teacher", device), rows)
    scorers: dict[str, Scorer] = {"teacher": teacher}
    if Need.REFERENCE in estimator.needs:
        scorers["reference"] = LocalScorer(pair.load("reference", device), rows, "reference")
    return scorers


def _lent(pair: Pair, device: torch.device, rows: int, name: str) -> LocalScorer:
    """Give the scorer of one of several models in this process.

    Raises:
        UserError: the student itself with sharded weights, which all processes would have to gather at once.
    """
    key = f"teachers.{name}"
    model = pair.lend(key, device)
    if model is pair.followed and any(isinstance(p, DTensor) for p in model.model.parameters()):
        expected = "whole weights: with rows of this teacher on some processes only, the others would be waited for"
        raise UserError(f"{key}.kind", expected, "student with sharded ones", "Use DDP, or make it the only teacher.")
    return LocalScorer(model, rows, key)
