"""Write comments behind the lines of a YAML text, and read what the dataclasses say of their keys.

The commands `config` and `init` write files with it, and the table of all keys in docs/ is made of what it reads.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple, get_type_hints

import yaml

__all__ = ["Place", "all_meanings", "meanings", "places", "with_comments"]

WIDEST = 60  # columns of a line behind which comments stand in one column


class Place(NamedTuple):
    """The place of a key in a YAML text.

    Attributes:
        line: that the key stands on, counted from 0.
        last: line of its value.
        text: of a value that is no mapping of further keys, else empty.
    """

    line: int
    last: int
    text: str


def places(text: str, prefix: str = "") -> dict[str, Place]:
    """Find every dotted key of a YAML text, the sections too."""
    return dict(_found(yaml.compose(text, Loader=yaml.SafeLoader), prefix))


def _found(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, Place]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        inherited = key.value == "<<"
        name, line = prefix if inherited else f"{prefix}.{key.value}".lstrip("."), key.start_mark.line
        if isinstance(value, yaml.ScalarNode) and not inherited:
            yield name, Place(line, value.end_mark.line, value.value)
        elif not inherited:
            holds_keys = isinstance(value, yaml.MappingNode) and bool(value.value)
            yield name, Place(line, line, "" if holds_keys else _written(value))
        yield from _found(value, name)


def _written(node: yaml.Node) -> str:
    return node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]


def with_comments(text: str, comments: Mapping[str, str]) -> str:
    """Write what is said of each key behind its line, or above it where its value takes several lines."""
    lines = text.splitlines()
    said = {place: comments[key] for key, place in places(text).items() if comments.get(key)}
    lengths = (len(lines[place.line]) for place in said)
    column = max((length for length in lengths if length <= WIDEST), default=0) + 2
    above: dict[int, str] = {}
    for place, comment in said.items():
        line = lines[place.line]
        if place.last > place.line:
            above[place.line] = f"{line[: len(line) - len(line.lstrip())]}# {comment}"
        else:
            lines[place.line] = f"{line:<{column - 2}}  # {comment}"
    return "".join(f"{above[n]}\n{line}\n" if n in above else f"{line}\n" for n, line in enumerate(lines))


def meanings(schema: type) -> dict[str, str]:
    """Read the line under each field of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for one in reversed([c for c in schema.__mro__ if is_dataclass(c)]):
        (body,) = (node.body for node in ast.parse(inspect.getsource(one)).body if isinstance(node, ast.ClassDef))
        found |= dict(_said(body))
    return found


def _said(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for own, below in pairwise(body):
        if isinstance(own, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield ast.unparse(own.target), str(below.value.value)


def all_meanings(schema: type) -> dict[str, str]:
    """Read what a dataclass and its sections say of every dotted key."""
    found, hints = meanings(schema), get_type_hints(schema)
    sections: dict[str, Any] = {name: hints[name] for name in found if is_dataclass(hints[name])}
    for name, section in sections.items():
        found |= {f"{name}.{key}": meaning for key, meaning in meanings(section).items()}
    return found
