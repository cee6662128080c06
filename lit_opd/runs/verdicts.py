"""Say what a check of the audit found: a verdict, the words for it, and what to do.

Every check returns what `conclude` makes. `auditing` collects the findings and `report` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["FAIL", "PASS", "VERDICTS", "WARN", "Finding", "conclude", "graded", "worst"]

VERDICTS = PASS, WARN, FAIL = "pass", "warn", "fail"


class Finding(NamedTuple):
    """The verdict of one check."""

    verdict: str  # `pass`, `warn` (it may be meant) or `fail` (training as configured goes wrong)
    found: str  # the observation, in words and numbers
    fix: str  # what to do; empty where the check passes
    numbers: Mapping[str, float]  # the values behind the words; log-probabilities and divergences in nats


def conclude(verdict: str, found: str, fix: str = "", **numbers: float) -> Finding:
    """Make a finding, without its fix where the check passes."""
    return Finding(verdict, found, "" if verdict == PASS else fix, numbers)


def graded(value: float, warn: float, fail: float = math.inf) -> str:
    """Grade a number by where warning and failure begin, the latter below where small numbers are the bad ones.

    A value that is not a number fails.
    """
    if fail < warn:
        value, warn, fail = -value, -warn, -fail
    if not value < fail:
        return FAIL
    return PASS if value < warn else WARN


def worst(verdicts: Iterable[str]) -> str:
    """Find the worst of some verdicts, or `pass` where there are none."""
    return max(verdicts, key=VERDICTS.index, default=PASS)
