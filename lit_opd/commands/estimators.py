"""Print the registry as a table.

The command `estimators` prints it on the terminal, and `tools/make_docs.py` into the page in docs/.
"""

from __future__ import annotations

from collections.abc import Iterator

from lit_opd import estimators
from lit_opd.estimators.needs import write_needs

__all__ = ["markdown_table", "print_table"]

FAMILIES = {
    "token": "each position for itself",
    "sequence": "a token also pays for those after it",
    "hybrid": "mixes, weights, outcomes",
}
TRADES = "what it does, and what it trades"
HEADER = ("name", "family", "aims at the gradient of", "unbiased", "needs", TRADES, "source")


def markdown_table() -> str:
    """Write the registry in Markdown, for each family a heading and a table."""
    return "\n\n".join(
        "\n".join([f"### {family}: {what}", "", _line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)])
        for family, what, rows in _families(quote="`")
    )


def print_table() -> None:
    """Print the registry on the terminal, its columns stacked so that a hundred characters are enough."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=max(100, terminal.width))
    for family, what, rows in _families():
        table = Table(box=box.SIMPLE_HEAD, title=f"{family}: {what}", title_justify="left", show_lines=True)
        for header in ("name", "aims at the gradient of, and needs", f"{TRADES}; source"):
            table.add_column(header)
        for name, _, target, unbiased, needs, summary, source in rows:
            aims_at = "-" if target == "-" else f"{target}, {'unbiased' if unbiased == 'yes' else 'biased'}"
            told = Text.assemble(summary, (f"\n{source}", "dim"))
            table.add_row(Text(name, no_wrap=True), f"{aims_at}\nneeds {needs}", told)
        console.print(table)


def _families(quote: str = "") -> Iterator[tuple[str, str, list[list[str]]]]:
    specs = [estimators.get(name) for name in estimators.names()]
    for family, what in FAMILIES.items():
        rows = [
            [f"{quote}{s.name}{quote}", s.family, c.target or "-", "yes" if c.unbiased else "no", write_needs(s.needs),
             s.summary, s.source] for s, c in ((s, s.contract(s.defaults)) for s in specs if s.family == family)
        ]  # fmt: skip
        if rows:
            yield family, what, rows


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
