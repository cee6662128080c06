"""Print an audit on the terminal, and write it for other programs.

The command `audit` calls it through `commands.experiments`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_opd.files import write_file
from lit_opd.lab.audit.auditing import Audit
from lit_opd.runs.numbers import finite
from lit_opd.runs.verdicts import VERDICTS

__all__ = ["print_audit", "write_json"]

_WIDTH, _SHOWN = 120, 8
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_audit(audit: Audit) -> None:
    """Print the verdicts with their fixes, and the ids with the largest log-ratios."""
    # A file keeps a fixed width; a terminal has its own.
    console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False, markup=False)
    console.print(_verdicts(audit))
    if audit.tokens:
        console.print("\nIds by mean log-ratio, student minus teacher, over the student's completions", style="bold")
        console.print(_ids(audit))
    counts = Counter(finding.verdict for finding in audit.findings.values())
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    seen = " of " + ", ".join(f"{count} {what}" for what, count in audit.probe.items()) if audit.probe else ""
    console.print(f"\n{said}, in {audit.seconds:.1f} s{seen}")


def write_json(audit: Audit, path: Path) -> None:
    """Write everything the audit found as JSON, with null for what is not a number."""
    values = {
        "verdict": audit.verdict,
        "findings": [{"item": item} | finding._asdict() for item, finding in audit.findings.items()],
        "tokens": [asdict(row) for row in audit.tokens],
        "probe": audit.probe,
        "seconds": audit.seconds,
    }
    write_file(Path(path), json.dumps(finite(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _verdicts(audit: Audit) -> Table:
    table = _table("item", "", "found")
    for item, finding in audit.findings.items():
        style = _STYLES[finding.verdict]
        table.add_row(item, Text(finding.verdict, style=style), finding.found)
        if finding.fix:
            table.add_row("", "", f"-> {finding.fix}", style=style)
    return table


def _ids(audit: Audit) -> Table:
    table = _table("  token", "id", "count", "nats", "share of sum", "the teacher expects")
    for row in audit.tokens[:_SHOWN]:
        error = "" if math.isnan(row.error) else f" ± {row.error:.2f}"
        table.add_row(f"  {row.token}", str(row.id), str(row.count), f"{row.mean:.2f}{error}", f"{row.share:.1%}",
                      f"{row.expected} ({row.expected_mass:.2f})", style="yellow" if row.huge else None)  # fmt: skip
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number < 2)
    return table
