"""Write the tables of docs/ that the code knows best, between their markers: estimators, measures, configuration keys.

Usage, from the root of the repository: ``python -m tools.make_docs [--check]``. With ``--check``, as in
``tests/test_docs.py``, nothing is written, and the exit code tells whether something would change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from lit_opd.commands.estimators import markdown_table
from lit_opd.config import Config
from lit_opd.config.comments import meanings
from lit_opd.measures.table import MEASURES
from lit_opd.runs.resuming import AT_A_RESUME

DOCS = Path(__file__).parents[1] / "docs"
OMEGACONF_MISSING = "???"


def measures(holds: Callable[[str], bool]) -> str:
    """Describe what is measured, of the kinds for which something holds."""
    rows = ((f"`{name}`", m.title, m.unit, m.better) for name, m in MEASURES.items() if holds(m.of))
    return table(("name", "what", "unit", "better"), rows)


def configuration() -> str:
    """Describe every key of the configuration, a table a section."""
    hints = get_type_hints(Config)
    sections = {own.name: hints[own.name] for own in fields(Config) if is_dataclass(hints[own.name])}
    said = meanings(Config)
    tables = [keys(Config, "", leave_out=sections)]
    tables += [f"### {name}\n\n{said[name]}\n\n{keys(schema, f'{name}.')}" for name, schema in sections.items()]
    return "\n\n".join(tables)


def at_a_resume() -> str:
    """Say of every key what becomes of another value where a run is resumed."""
    rows = [(side, ", ".join(f"`{key}`" for key in keys)) for side, keys in AT_A_RESUME.items()]
    return table(("at a resume", "keys"), [*rows, ("told", "every other key")])


def keys(schema: type, prefix: str, leave_out: Iterable[str] = ()) -> str:
    """Describe the keys of one section."""
    said = meanings(schema)
    shown = (own for own in fields(schema) if own.name not in leave_out)
    return table(("key", "default", "meaning"), ((f"`{prefix}{f.name}`", default_of(f), said[f.name]) for f in shown))


def default_of(own: Field[Any]) -> str:
    """Write a field's default as a configuration file would."""
    value = own.default if own.default_factory is MISSING else own.default_factory()
    if value == OMEGACONF_MISSING:
        return "must be set"
    words = {None: "null", True: "true", False: "false", "": '""'}
    return f"`{words[value] if isinstance(value, bool | None) or value == '' else value}`"


def table(header: tuple[str, ...], rows: Iterable[tuple[str | None, ...]]) -> str:
    """Write a table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join((cell or "-").replace("|", "\\|") for cell in line) + " |" for line in lines)


# By page and marker.
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "estimators.md": {"estimators": markdown_table},
    "measures.md": {
        "yardsticks": lambda: measures(lambda kind: kind in ("token", "completion")),
        "steps": lambda: measures(lambda kind: kind == "step"),
        "positions": lambda: measures(lambda kind: kind not in ("token", "completion", "step")),
    },
    "configuration.md": {"resume": at_a_resume, "keys": configuration},
}


def page(name: str, text: str) -> str:
    """Put the tables of a page where its markers are."""
    for marker, write in BLOCKS[name].items():
        before, opening, rest = text.partition(f"<!-- {marker} -->\n")
        _, closing, after = rest.partition(f"\n<!-- /{marker} -->")
        if not closing:
            raise SystemExit(f"docs/{name} has no place for {marker}: <!-- {marker} --> ... <!-- /{marker} -->")
        text = before + opening + write() + closing + after
    return text


def main() -> int:
    """Write all pages, or tell which are not as they would be written."""
    old = {name: (DOCS / name).read_text() for name in BLOCKS}
    new = {name: page(name, text) for name, text in old.items()}
    changed = [name for name in BLOCKS if old[name] != new[name]]
    if sys.argv[1:] == ["--check"]:
        print(*(f"docs/{name} is not what the code says: run python -m tools.make_docs" for name in changed), sep="\n")
        return len(changed)
    for name in changed:
        (DOCS / name).write_text(new[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
