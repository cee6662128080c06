"""Describe an estimator in words: what it is, what it declares, and its keywords.

The commands `check` and `estimators NAME` print it, and the table of all estimators holds its keywords.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_opd import estimators
from lit_opd.estimators.contract import Contract, EstimatorSpec
from lit_opd.estimators.needs import write_needs
from lit_opd.functional.support import SUPPORTS

__all__ = ["AT_EQUAL", "Keyword", "keywords_of", "print_contract", "print_keywords", "print_pairs", "standard_console"]

AT_EQUAL = {"sample": "zero for every sample", "expectation": "zero in expectation only", "never": "not zero"}

_WIDTH = 100
_NO_TARGET = "no known gradient: it claims nothing, or changes the optimum"
# Keywords that mean the same wherever they are taken.
_CONVENTIONAL = {
    "k": "size of the support, in tokens.",
    "support": f"whose most probable tokens are compared: {', '.join(SUPPORTS)}.",
    "base": "the estimator whose tokens are weighed: a name, or a mapping with the key name and keywords.",
}
_ARGS = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ARG = re.compile(r"^    ([\w, ]+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


class Keyword(NamedTuple):
    """A keyword of an estimator, in words.

    Attributes:
        name: of the key under `estimator.kwargs`.
        type: of its values.
        default: as a configuration writes it; empty where it must be given.
        meaning: what the function's docstring says of it.
    """

    name: str
    type: str
    default: str
    meaning: str


def keywords_of(spec: EstimatorSpec) -> list[Keyword]:
    """List the keywords of an estimator, in the order in which its function takes them."""
    annotations, said = {"base": "str | dict"} | inspect.get_annotations(spec.fn), _meanings(spec)
    return [
        Keyword(name, _type(annotations.get(name), default), _default(default), said.get(name, ""))
        for name, default in spec.defaults.items()
    ]


def standard_console() -> Console:
    """Print as wide as the terminal is, and in a file or a pipe a hundred columns."""
    return Console(width=None if Console().is_terminal else _WIDTH, highlight=False, markup=False)


def print_contract(console: Console, spec: EstimatorSpec, contract: Contract, label: str = "") -> None:
    """Print what an estimator is and declares.

    Args:
        console: where to.
        spec: the estimator.
        contract: what it declares with the keywords in question.
        label: these keywords.
    """
    console.print(f"{spec.name} {label}".rstrip(), style="bold")
    lines = {"is": spec.summary}
    if spec.name in estimators.names():
        lines |= {
            "family": spec.family,
            "needs": write_needs(spec.needs),
            "aims at": contract.aim or _NO_TARGET,
            "at p = q": f"a gradient that is {AT_EQUAL[contract.at_equal]}",
            "source": spec.source,
        }
    else:
        lines["declares"] = "nothing, as it is not registered: taken for one that sees sampled tokens, one by one"
    print_pairs(console, lines)
    print_keywords(console, spec)


def print_keywords(console: Console, spec: EstimatorSpec) -> None:
    """Print a table of the keywords, where there are any."""
    if not (keywords := keywords_of(spec)):
        print_pairs(console, {"keywords": "none"})
        return
    console.print()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("  keyword", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning")
    for keyword in keywords:
        row = (f"  {keyword.name}", keyword.type, keyword.default or "must be set", keyword.meaning)
        table.add_row(*map(Text, row))
    console.print(table)


def print_pairs(console: Console, lines: Mapping[str, str], style: str | None = None) -> None:
    """Print lines of a key and a text, without those whose text is empty."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=10, no_wrap=True)
    for key, text in lines.items():
        if text:
            table.add_row(f"  {key}", text, style=style)
    console.print(table)


def _meanings(spec: EstimatorSpec) -> dict[str, str]:
    """Read the section Args of the docstring."""
    found = _ARGS.search(inspect.getdoc(spec.fn) or "")
    entries = _ARG.findall(found.group(1)) if found else []
    said = {name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")}
    return _CONVENTIONAL | said


def _type(annotation: Any, default: Any) -> str:
    if annotation is None:
        return "-" if default is inspect.Parameter.empty or default is None else type(default).__name__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(value: Any) -> str:
    """Write a default as YAML does."""
    if value is inspect.Parameter.empty:
        return ""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
