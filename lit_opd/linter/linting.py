"""Lint a run: gather the facts, ask every rule, refuse or warn."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lit_opd.config import Config, StudentConfig, TeacherConfig, check_values
from lit_opd.errors import UserError, suggest
from lit_opd.estimators import BoundEstimator
from lit_opd.linter.findings import Facts, Finding, LintWarning
from lit_opd.linter.probes import probe
from lit_opd.linter.rules import RULES
from lit_opd.models import LanguageModel, load_tokenizer, read_model_config, token_ids

__all__ = ["check", "enforce", "lint"]


def check(config: Config, estimator: BoundEstimator, student: Any, teacher: Any, tokenizer: Any = None) -> None:
    """Check every value of a run, lint it, and enforce what is found; reads no weights.

    Args:
        config: the run.
        estimator: what it names, bound.
        student: `StudentConfig`, a path, or a model in memory.
        teacher: `TeacherConfig`, a path, or a model in memory.
        tokenizer: the student's; by default read from its folder where it is needed.

    Raises:
        UserError: a value out of its range, or the first refusal that `lint.allow` does not name.
    """
    check_values(config)
    config = replace(config, teacher=teacher) if isinstance(teacher, TeacherConfig) else config
    enforce(lint(config, estimator, *_student_tokens(config, student, tokenizer)), config.lint.allow)


def lint(
    config: Config, estimator: BoundEstimator, masked_ids: Iterable[int] = (), stop_ids: Iterable[int] = ()
) -> list[Finding]:
    """Everything the rules have against a run.

    Args:
        config: the run.
        estimator: what it names, bound.
        masked_ids: the tokens that are not counted.
        stop_ids: the tokens that end a completion; empty where they are not known.
    """
    facts = Facts(tuple(map(probe, estimator.terms)), frozenset(masked_ids), frozenset(stop_ids))
    return [finding for rule in RULES if (finding := rule(config, estimator, facts)) is not None]


def enforce(findings: Sequence[Finding], allow: Collection[str] = ()) -> None:
    """Raise for the first refusal that is not allowed; else warn of every finding, allowed refusals among them.

    Args:
        findings: those of `lint`.
        allow: rules whose refusals may pass.

    Raises:
        UserError: a refusal, or an unknown name in `allow`.
    """
    known = [rule.__name__ for rule in RULES]
    for name in allow:
        if name not in known:
            raise UserError("lint.allow", "names of rules", repr(name), suggest(name, known))
    for finding in findings:
        if finding.severity == "refuse" and finding.rule not in allow:
            raise finding.as_error(f"lint.allow=[{finding.rule}] lets it pass knowingly.")
    for finding in findings:
        closing = f"Let pass by lint.allow=[{finding.rule}]." if finding.severity == "refuse" else ""
        # The line to show is the one that makes the module.
        warnings.warn(str(finding.as_error(closing)), LintWarning, stacklevel=4)


def _student_tokens(config: Config, student: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the masked tokens, and of those that end a completion; not looked up where nothing is masked."""
    student = StudentConfig(path=student) if isinstance(student, str) else student
    masked_tokens, in_memory = config.estimator.masked_tokens, not isinstance(student, StudentConfig)
    if not masked_tokens or (in_memory and tokenizer is None):
        return [], []
    tokenizer = tokenizer or load_tokenizer(student, "student")
    masked_ids = token_ids(tokenizer, masked_tokens, "estimator.masked_tokens")
    if in_memory:
        return masked_ids, LanguageModel(student, tokenizer, "student").stop_ids
    return masked_ids, _stop_ids(student, tokenizer)


def _stop_ids(student: StudentConfig, tokenizer: Any) -> list[int]:
    """What `LanguageModel.stop_ids` will be once the weights are there."""
    from transformers import GenerationConfig

    sources = [tokenizer, read_model_config(student, "student")]
    with suppress(OSError):  # most folders have one, none needs it
        sources.append(GenerationConfig.from_pretrained(student.path))
    known = set(tokenizer.get_vocab().values())
    named = [getattr(source, "eos_token_id", None) for source in sources]
    flat = [i for ids in named for i in (ids if isinstance(ids, list | tuple) else [ids])]
    return sorted(known.intersection(flat))
