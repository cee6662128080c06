"""Print the registry as a table, or one estimator with its formula and keywords.

The command `estimators` prints both on the terminal, and `tools/make_docs.py` the table into the page in docs/.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from lit_opd import estimators
from lit_opd.commands.describing import keywords_of, print_contract, print_pairs, standard_console
from lit_opd.estimators.contract import EstimatorSpec
from lit_opd.estimators.needs import write_needs

__all__ = ["markdown_table", "print_estimator", "print_table"]

FAMILIES = {
    "token": "each position for itself",
    "sequence": "a token also pays for those after it",
    "hybrid": "mixes, weights, outcomes",
}
TRADES = "what it does, and what it trades"
HEADER = ("name", "family", "aims at the gradient of", "unbiased", "needs", "keywords and defaults", TRADES, "source")


def markdown_table() -> str:
    """Write the registry in Markdown, for each family a heading and a table."""
    return "\n\n".join(
        "\n".join([f"### {family}: {what}", "", _line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)])
        for family, what, rows in _families(quote="`")
    )


def print_estimator(name: str) -> None:
    """Print one estimator on the terminal: its contract, keywords, formula, and how a configuration selects it.

    Raises:
        UserError: no such name, file or function.
    """
    spec, console = estimators.get(name), standard_console()
    print_contract(console, spec, spec.contract(spec.defaults))
    body = (inspect.getdoc(spec.fn) or "").partition("\n\n")[2].partition("Args:\n")[0]
    formula = "\n\n".join(" ".join(paragraph.split()) for paragraph in body.split("\n\n") if paragraph.strip())
    keyword = next((f" estimator.kwargs.{k.name}={k.default or '...'}" for k in keywords_of(spec)), "")
    console.print()
    lines = {"formula": re.sub(r"^Formula[:,] ", "", formula), "train with": f"estimator.name={name}{keyword}"}
    print_pairs(console, lines | {"check with": f"python -m lit_opd check {name}"})


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
        for header in ("name", "aims at the gradient of; needs; keywords", f"{TRADES}; source"):
            table.add_column(header)
        for name, _, target, unbiased, needs, keywords, summary, source in rows:
            aims_at = "-" if target == "-" else f"{target}, {'unbiased' if unbiased == 'yes' else 'biased'}"
            told = Text.assemble(summary, (f"\n{source}", "dim"))
            takes = f"\n{keywords}" if keywords else ""
            table.add_row(Text(name, no_wrap=True), f"{aims_at}\nneeds {needs}{takes}", told)
        console.print(table)


def _families(quote: str = "") -> Iterator[tuple[str, str, list[list[str]]]]:
    specs = [estimators.get(name) for name in estimators.names()]
    for family, what in FAMILIES.items():
        rows = [_cells(spec, quote) for spec in specs if spec.family == family]
        if rows:
            yield family, what, rows


def _cells(spec: EstimatorSpec, quote: str) -> list[str]:
    contract = spec.contract(spec.defaults)
    unbiased = "yes" if contract.unbiased else "no"
    return [f"{quote}{spec.name}{quote}", spec.family, contract.target or "-", unbiased, write_needs(spec.needs),
            _keywords(spec, quote), spec.summary, spec.source]  # fmt: skip


def _keywords(spec: EstimatorSpec, quote: str) -> str:
    return ", ".join(f"{quote}{k.name}{f'={k.default}' if k.default else ''}{quote}" for k in keywords_of(spec))


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
