"""What a rule judges by, and what it finds."""

from __future__ import annotations

from typing import NamedTuple

from lit_opd.errors import UserError
from lit_opd.linter.probes import Probe

__all__ = ["Facts", "Finding", "LintWarning"]


class LintWarning(UserWarning):
    """A configuration that may not do what it says, or one that was let pass knowingly."""


class Facts(NamedTuple):
    """What rules judge by, besides the configuration.

    Attributes:
        probes: one for every term of the estimator.
        masked_ids: the tokens that are not counted.
        stop_ids: the tokens that end a completion; empty where they are not known.
    """

    probes: tuple[Probe, ...] = ()
    masked_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()


class Finding(NamedTuple):
    """What a rule has against a configuration.

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
        """The finding as a mistake of the user, one line that ends with `closing`."""
        return UserError(self.key, self.reason, self.found, f"{self.remedy} {closing}".strip())
