"""The audit: what would spoil a long run, looked for before it."""

from lit_opd.lab.audit.auditing import CHECKS, Audit, audit
from lit_opd.lab.audit.findings import Finding
from lit_opd.lab.audit.report import check_destination, print_audit, write_json

__all__ = ["CHECKS", "Audit", "Finding", "audit", "check_destination", "print_audit", "write_json"]
