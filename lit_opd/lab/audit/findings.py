"""What a check of the audit says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["FAIL", "PASS", "VERDICTS", "WARN", "Finding", "graded", "worst"]

VERDICTS = PASS, WARN, FAIL = "pass", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """The verdict on one item.

    Attributes:
        item: what was looked at.
        verdict: `pass`, `warn` (it can be meant) or `fail` (training as configured goes wrong).
        found: what was seen, in words and numbers.
        fix: what to do; empty where it passes.
        numbers: the values behind the words; log-probabilities and divergences in nats.
    """

    item: str
    verdict: str
    found: str
    fix: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


def graded(value: float, warn: float, fail: float = float("inf")) -> str:
    """The verdict on a number that had better be small; one that is not a number fails.

    Args:
        value: the number.
        warn: where a warning begins.
        fail: where a failure begins.
    """
    if not value < fail:
        return FAIL
    return PASS if value < warn else WARN


def worst(findings: Iterable[Finding]) -> str:
    """The worst verdict among findings; `pass` where there are none."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default=PASS)
