"""Lint a run: gather the facts, ask every rule, refuse or warn.

Called by `runs.prepare` and by `DistillationModule`, before weights load.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lit_opd.config import OptimConfig, RolloutConfig, StudentConfig, TeacherConfig
from lit_opd.errors import UserError, suggest
from lit_opd.estimators import BoundEstimator
from lit_opd.linter.facts import Facts, Finding, LintWarning
from lit_opd.linter.probes import probe
from lit_opd.linter.rules import RULES
from lit_opd.models import LanguageModel, load_tokenizer, read_model_config, read_stop_ids, token_ids

__all__ = ["check", "enforce", "lint"]


def check(
    estimator: BoundEstimator,
    rollout: RolloutConfig,
    optim: OptimConfig,
    student: Any,
    teacher: Any,
    *,
    masked_tokens: Sequence[str | int] = (),
    tokenizer: Any = None,
    allow: Collection[str] = (),
) -> None:
    """Lint a run and enforce the findings, without reading weights.

    Models are sections, paths or in memory; masked tokens are texts or ids. The tokenizer is the student's, by default
    read from its folder where it is needed. `allow` names rules whose refusals may pass.

    Raises:
        UserError: the first refusal that `allow` does not name.
    """
    student = StudentConfig(path=student) if isinstance(student, str) else student
    several = teacher.values() if isinstance(teacher, Mapping) else [teacher]
    temperatures = [one.temperature for one in several if isinstance(one, TeacherConfig)]
    temperature = next((value for value in temperatures if value != 1), 1.0)
    masked_ids, stop_ids = _student_tokens(student, masked_tokens, tokenizer)
    ids = frozenset(masked_ids), frozenset(stop_ids)
    section = student if isinstance(student, StudentConfig) else None
    facts = Facts(estimator, rollout, optim, temperature, masked_tokens, *ids, section)
    enforce(lint(facts), allow)


def lint(facts: Facts) -> list[Finding]:
    """Collect the objections of all rules to a run, after probing every term of its estimator."""
    facts = facts._replace(probes=tuple(map(probe, facts.estimator.terms)))
    return [finding for rule in RULES if (finding := rule(facts)) is not None]


def enforce(findings: Sequence[Finding], allow: Collection[str] = ()) -> None:
    """Raise for the first refusal that is not allowed, or else warn of every finding, allowed refusals among them.

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


def _student_tokens(student: Any, masked_tokens: Sequence[str | int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Look up the ids of the masked tokens and of those that end a completion, or neither where nothing is masked."""
    in_memory = not isinstance(student, StudentConfig)
    if not masked_tokens or (in_memory and tokenizer is None):
        return [], []
    tokenizer = tokenizer or load_tokenizer(student, "student")
    masked_ids = token_ids(tokenizer, masked_tokens, "estimator.masked_tokens")
    if in_memory:
        return masked_ids, LanguageModel(student, tokenizer, "student").stop_ids
    return masked_ids, read_stop_ids(student, tokenizer, read_model_config(student, "student"))
