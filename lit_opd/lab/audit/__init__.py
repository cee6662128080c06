"""Look for what would spoil a long run, before it: the command `audit`."""

from lit_opd.lab.audit.auditing import CHECKS, Audit, audit
from lit_opd.lab.audit.report import print_audit, write_json
from lit_opd.runs.verdicts import Finding

__all__ = ["CHECKS", "Audit", "Finding", "audit", "print_audit", "write_json"]
