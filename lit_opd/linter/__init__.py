"""Refuse configurations that cannot do what they say, before any weight loads, each with the reason and the fix."""

from lit_opd.linter.facts import Facts, Finding, LintWarning
from lit_opd.linter.linting import check, enforce, lint
from lit_opd.linter.probes import Probe, probe
from lit_opd.linter.rules import RULES

__all__ = ["RULES", "Facts", "Finding", "LintWarning", "Probe", "check", "enforce", "lint", "probe"]
