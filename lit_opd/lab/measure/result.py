"""Hold what a measurement found, and name each of its numbers once.

`experiment` fills it. `show` prints and records it, and `figure` draws it, all by the table `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lit_opd.files import finite
from lit_opd.lab.measure.moments import Moments
from lit_opd.measures.intervals import Interval

__all__ = ["COLUMNS", "Column", "Measurement", "Row"]


@dataclass(frozen=True)
class Row:
    """One estimator's gradients."""

    label: str  # what it is called here
    name: str  # as registered
    family: str
    target: str | None  # that it declares
    against: dict[str, Moments]  # bias and direction against the `local` and the `sequence` reverse KL
    trace_variance: Interval  # of the gradient of one prompt, in squared units of the gradient
    # Squared norm of the expected gradient over that variance, for one prompt; n prompts have n times as much.
    signal_to_noise: Interval
    top_share: float  # of the sum of tokens' gradient norms, held by the largest 1% of them
    seconds: float  # median for one unit: teacher, forward and backward
    memory_mb: float  # that tensors take meanwhile

    def as_json(self) -> dict[str, Any]:
        """Name all values in one flat mapping, the ends of intervals as `_low` and `_high`."""
        flat: dict[str, Any] = {}
        for key, column in COLUMNS.items():
            value = column.read(self)
            if isinstance(value, Interval):
                flat |= {key: value.mean, f"{key}_low": value.low, f"{key}_high": value.high}
            else:
                flat[key] = value
        return flat


def plain(value: float) -> str:
    """Write a number in two decimals, or three digits where it is large, or `?` where it is not known."""
    if value != value:
        return "?"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def with_ends(interval: Interval, number: Callable[[float], str] = plain) -> str:
    """Write a mean with the ends of its interval, or alone where it is known exactly or not at all."""
    if interval.low == interval.high or interval.mean != interval.mean:
        return number(interval.mean)
    return f"{number(interval.mean)} [{number(interval.low)}, {number(interval.high)}]"


class Column(NamedTuple):
    """One value of a row."""

    read: Callable[[Row], Any]
    heading: str = ""  # on the terminal, which shows those that have one
    show: Callable[[Any], str] = str


# By their names in JSON and MLflow, in the order of the terminal.
COLUMNS = {
    "label": Column(lambda row: row.label, "estimator"),
    "name": Column(lambda row: row.name),
    "family": Column(lambda row: row.family),
    "target": Column(lambda row: row.target),
    "bias_local": Column(lambda row: row.against["local"].relative_bias, "bias, local", with_ends),
    "bias_sequence": Column(lambda row: row.against["sequence"].relative_bias, "bias, sequence", with_ends),
    "cosine_local": Column(lambda row: row.against["local"].cosine, "cosine, local", with_ends),
    "cosine_sequence": Column(lambda row: row.against["sequence"].cosine, "cosine, sequence", with_ends),
    "trace_variance": Column(lambda row: row.trace_variance),
    "signal_to_noise": Column(lambda row: row.signal_to_noise, "signal / noise",
                              lambda interval: with_ends(interval, "{:.2g}".format)),
    "top_share": Column(lambda row: row.top_share, "top 1%", "{:.0%}".format),
    "seconds": Column(lambda row: row.seconds, "ms", lambda seconds: f"{1000 * seconds:.0f}"),
    "memory_mb": Column(lambda row: row.memory_mb, "MB", "{:.0f}".format),
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """All rows, and what they were measured on."""

    rows: list[Row]  # one for each estimator
    units: int  # independent ones
    units_asked: int  # how many there were to be; Ctrl-C leaves fewer
    prompts_per_unit: int
    completions: int  # of each prompt
    tokens: int  # counted in all units
    coordinates: int  # of the gradient that was looked at
    sketch: int  # dimensions that were kept of them
    models: dict[str, str]  # names of student and teacher, and the teacher's quantisation
    on_policy: bool = True  # False where another law than the student's sampled: no sequence target is known there

    @property
    def interrupted(self) -> bool:
        """True where Ctrl-C ended it before all units were seen."""
        return self.units < self.units_asked

    def as_json(self) -> dict[str, Any]:
        """Write what `--json` writes: one flat mapping an estimator, null for what cannot be told."""
        about = {key: value for key, value in asdict(self).items() if key != "rows"}
        return finite(about | {"estimators": [row.as_json() for row in self.rows]})
