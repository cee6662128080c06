"""The facts of a run that a rule of the linter judges by, and the finding it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lit_opd.config import OptimConfig, RolloutConfig, StudentConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.linter.probes import Probe

__all__ = ["Facts", "Finding", "LintWarning"]


class Facts(NamedTuple):
    """A run as the rules see it.

    Attributes:
        estimator: bound.
        rollout: the section.
        optim: the section.
        teacher_temperature: other than 1, the target is not the teacher that evaluations measure.
        masked_tokens: as configured.
        masked_ids: the tokens that are not counted.
        stop_ids: the tokens that end a completion; empty where they are not known.
        student: the section; None for a model in memory.
        probes: one for every term of the estimator.
    """

    estimator: BoundEstimator
    rollout: RolloutConfig
    optim: OptimConfig
    teacher_temperature: float = 1.0
    masked_tokens: Sequence[str | int] = ()
    masked_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    student: StudentConfig | None = None
    probes: tuple[Probe, ...] = ()


class Finding(NamedTuple):
    """The objection of a rule to a configuration.

    Attributes:
        rule: its name, as `lint.allow` takes it.
        severity: `refuse`, or `warn` where it can be meant.
        key: the configuration key to blame.
        found: its value, or what was found of it.
        reason: what is expected there, and why.
        remedy: what to do, in sentences.
    """

    rule: str
    severity: str
    key: str
    found: str
    reason: str
    remedy: str

    def as_error(self, closing: str) -> UserError:
        """Make a mistake of the user of it, told in one line that ends with `closing`."""
        return UserError(self.key, self.reason, self.found, f"{self.remedy} {closing}".strip())
