"""Read which teacher each row is for, by name or as weights by name.

The data module calls it, and `teachers.RoutedScorer` follows the weights, which travel with every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_opd.errors import UserError, suggest
from lit_opd.plugins import calling, import_object

__all__ = ["read_routes"]

KEY = "data.teacher_column"
SUM = 1e-6  # how far from 1 the weights of a row may add up


def read_routes(
    rows: Sequence[Mapping[str, Any]], column: str | None, teachers: Sequence[str]
) -> list[list[float]] | None:
    """Read the weight of each teacher for each row, or nothing where there is one teacher.

    Args:
        rows: of the data set.
        column: what holds the name of a row's teacher, or weights by name; or a function of the row that returns one
            of these: package.module:function or file.py:function.
        teachers: their names.

    Raises:
        UserError: no column for several teachers or one for a single teacher, a row without a value or with one that
            names no teacher, weights that are negative or do not add up to 1.
    """
    if not teachers:
        if column is not None:
            raise UserError(KEY, "null where there is one teacher", repr(column), "Unset it, or name several teachers.")
        return None
    if column is None:
        expected = f"a column or a function that names a row's teacher: {', '.join(teachers)}"
        raise UserError(KEY, expected, "null", f"Set {KEY}.")
    read = _reader(column)
    return [_weights(read(row), number, teachers) for number, row in enumerate(rows)]


def _reader(column: str) -> Callable[[Mapping[str, Any]], Any]:
    if ":" not in column:
        return lambda row: _held(row, column)
    function = import_object(KEY, column)

    def called(row: Mapping[str, Any]) -> Any:
        with calling(KEY, f"{column} to run"):
            return function(row)

    return called


def _held(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise UserError(KEY, f"a column of the rows ({', '.join(map(str, row))})", repr(column), "Name one of them.")
    return row[column]


def _weights(value: Any, number: int, teachers: Sequence[str]) -> list[float]:
    """Spell the weights of one row for all teachers."""
    named = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(named, Mapping):
        expected, remedy = "the name of a teacher, or a mapping of names to weights", "Correct the row."
        raise UserError(KEY, expected, f"{value!r:.80} in row {number}", remedy)
    # A table gives the keys of other rows, as null.
    named = {name: weight for name, weight in named.items() if weight is not None}
    for name, weight in named.items():
        if name not in teachers:
            expected = f"one of the teachers {', '.join(teachers)}"
            raise UserError(KEY, expected, f"{name!r} in row {number}", suggest(str(name), teachers))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise UserError(KEY, "weights of at least 0", f"{name}: {weight!r} in row {number}", "Correct the row.")
    total = math.fsum(named.values())
    if not abs(total - 1) <= SUM:
        raise UserError(KEY, "weights that add up to 1", f"{total:g} in row {number}", "Divide them by their sum.")
    return [float(named.get(name, 0.0)) / total for name in teachers]
