"""The registry as a table, made from the code."""

from __future__ import annotations

from lit_opd import estimators

__all__ = ["markdown_table", "print_table"]

HEADER = ("name", "family", "aims at the gradient of", "unbiased", "needs", "what it is", "source")


def _rows() -> list[tuple[str, ...]]:
    specs = [estimators.get(name) for name in estimators.names()]
    return [
        (s.name, s.family, s.target or "-", "yes" if s.unbiased else "no", s.needs, s.summary, s.source) for s in specs
    ]


def markdown_table() -> str:
    """The registry as a Markdown table."""
    lines = [HEADER, tuple("---" for _ in HEADER), *((f"`{row[0]}`", *row[1:]) for row in _rows())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_table() -> None:
    """The registry on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    for name in HEADER:
        table.add_column(name)
    for row in _rows():
        table.add_row(*row)
    Console().print(table)
