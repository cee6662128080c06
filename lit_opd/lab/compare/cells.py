"""Write the numbers, names and tables of a report as Markdown.

`document` calls this, and so does `tools/make_results.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lit_opd.lab.compare.analysis import LARGEST_LOG, Contrast, Row

__all__ = ["amount", "capital", "code", "interval", "numbers", "probability", "table"]

NUMBER = re.compile(r"[-<]?[\d.,e+-]+( \[.*\])?")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, columns of numbers aligned to the right."""
    columns = [[row[place] for row in rows if row[place]] for place in range(len(header))]
    lines = ["---:" if cells and all(map(NUMBER.fullmatch, cells)) else "---" for cells in columns]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, lines, *rows]
    )


def code(name: str) -> str:
    """Write a name as code, so that Markdown leaves it alone."""
    return f"`{name}`"


def capital(text: str) -> str:
    """Begin a sentence with a text."""
    return text[:1].upper() + text[1:]


def numbers(found: Contrast, as_ratio: bool) -> str:
    """Write a difference and its interval, on a log scale as a ratio."""

    def turn(value: float) -> float:
        return math.exp(min(value, LARGEST_LOG)) if as_ratio else value

    low, high = (None if end is None else turn(end) for end in (found.low, found.high))
    return _numbers(turn(found.difference), low, high)


def interval(found: Row) -> str:
    """Write the mean of a variant and its interval.

    >>> interval(Row("token", 0.12345, 0.1001, 0.1468, "best", {}))
    '0.123 [0.100, 0.147]'
    """
    return "not finite" if found.mean is None else _numbers(found.mean, found.low, found.high)


def _numbers(mean: float, low: float | None, high: float | None) -> str:
    """Write a value and its interval to two digits of the interval's width."""
    if low is None or high is None:
        return f"{mean:.4g}"
    width = high - low
    # Adding zero turns a minus zero into a plain one.
    if not 0 < width < math.inf:
        return f"{mean + 0.0:.4g} [{low + 0.0:.4g}, {high + 0.0:.4g}]"
    if low > 0 and high > 10 * low:  # orders of magnitude, of which decimals would hide the lower end
        low, high = (float(f"{end:.2g}") for end in (low, high))  # so that 440 is not written as 4.4e+02
        return f"{float(f'{mean:.3g}'):g} [{low:g}, {high:g}]"
    decimals = min(12, max(0, 1 - math.floor(math.log10(width))))
    centre, low, high = (round(value, decimals) + 0.0 for value in (mean, low, high))
    return f"{centre:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def probability(p: float) -> str:
    """Write a p-value, e.g. `0.032`, `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float | None) -> str:
    """Write a cost, e.g. `12,345` or `0.482`, or nothing where it was not recorded."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
