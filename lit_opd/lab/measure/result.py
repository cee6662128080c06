"""What a measurement found, as numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lit_opd.lab.measure.moments import Moments
from lit_opd.measures.intervals import Interval
from lit_opd.runs.numbers import finite

__all__ = ["Measurement", "Row"]


@dataclass(frozen=True)
class Row:
    """What was found of one estimator.

    Attributes:
        label: what it is called here.
        name: as registered.
        family: of the estimator.
        target: that it declares.
        against: bias and direction against the `local` and the `sequence` reverse KL.
        trace_variance: of the gradient of one prompt, in squared units of the gradient.
        signal_to_noise: squared norm of the expected gradient over that variance, for one prompt; n prompts have n
            times as much.
        top_share: share of the sum of tokens' gradient norms that the largest 1% of them have.
        seconds: median for one unit: teacher, forward and backward.
        memory_mb: that tensors take meanwhile.
    """

    label: str
    name: str
    family: str
    target: str | None
    against: dict[str, Moments]
    trace_variance: Interval
    signal_to_noise: Interval
    top_share: float
    seconds: float
    memory_mb: float

    def numbers(self) -> dict[str, float]:
        """All of them by name, the ends of intervals as `_low` and `_high`."""
        intervals = {"trace_variance": self.trace_variance, "signal_to_noise": self.signal_to_noise}
        for key, moments in self.against.items():
            intervals |= {f"bias_{key}": moments.relative_bias, f"cosine_{key}": moments.cosine}
        flat = {"top_share": self.top_share, "seconds": self.seconds, "memory_mb": self.memory_mb}
        for name, interval in intervals.items():
            flat |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return flat


@dataclass(frozen=True)
class Measurement:
    """All rows, and what they were measured on.

    Attributes:
        rows: one for each estimator.
        units: independent ones.
        units_asked: how many there were to be; Ctrl-C leaves fewer.
        prompts_per_unit: in each.
        completions: of each prompt.
        tokens: counted in all of them.
        coordinates: of the gradient that was looked at.
        sketch: dimensions that were kept of them.
        models: names of student and teacher, and the teacher's quantisation.
        on_policy: whether the student's own law sampled; under another the sequence's target is not known.
    """

    rows: list[Row]
    units: int
    units_asked: int
    prompts_per_unit: int
    completions: int
    tokens: int
    coordinates: int
    sketch: int
    models: dict[str, str]
    on_policy: bool = True

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before all units were seen."""
        return self.units < self.units_asked

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes: one flat mapping an estimator, null for what cannot be told."""
        about = {key: value for key, value in asdict(self).items() if key != "rows"}
        named = ("label", "name", "family", "target")
        rows = [{key: getattr(row, key) for key in named} | row.numbers() for row in self.rows]
        return finite(about | {"estimators": rows})
