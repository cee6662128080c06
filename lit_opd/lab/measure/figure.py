"""Draw bias against noise, and the direction of every estimator, in one picture, for `show`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_opd.files import write_file
from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.measures.drawing import figure, look, plain, png, style
from lit_opd.measures.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

LINE_WIDTH = 150  # letters that fit beside each other below the panels


def draw(measurement: Measurement, file: Path) -> Path:
    """Write the picture as PNG: bias against both targets over the prompts that one signal needs."""
    with style():
        write_file(file, png(_compose(measurement.rows, measurement.on_policy), dpi=110))
    return file


def _compose(rows: Sequence[Row], on_policy: bool = True) -> Figure:
    composed = figure(10, 4.6)
    axes = composed.subplots(1, 2, sharex=True)
    handles: dict[str, Any] = {}
    missing: dict[str, None] = {}
    for ax, key in zip(axes, ("local", "sequence"), strict=True):
        drawn = {number: row for number, row in enumerate(rows) if _can_be_drawn(row, key)}
        far = 3 * max((_reach(row) for row in drawn.values()), default=1.0)
        handles |= {row.label: _point(ax, row, key, number, far) for number, row in drawn.items()}
        missing |= dict.fromkeys(row.label for number, row in enumerate(rows) if drawn and number not in drawn)
        if not drawn:
            ax.text(0.5, 0.5, _why_empty(rows, key, on_policy), ha="center", transform=ax.transAxes)
        ax.set_title(f"against the {key} reverse KL")
        ax.set_xlabel("noise / signal: prompts until they are equal")
        ax.set_xscale("log")
        ax.set_ylim(bottom=-0.03)
        ax.grid()
    axes[0].set_ylabel("bias, relative to the target's norm")
    if missing:
        text = f"not drawn, cannot be told from zero: {', '.join(missing)}"
        composed.supxlabel(textwrap.fill(text, LINE_WIDTH), fontsize=8)
    order = [row.label for row in rows if row.label in handles]
    composed.legend([handles[label] for label in order], [plain(label) for label in order],
                    loc="outside lower center", ncols=4, frameon=False, fontsize=8)  # fmt: skip
    return composed


def _can_be_drawn(row: Row, key: str) -> bool:
    return all(map(math.isfinite, (_inverse(row.signal_to_noise).mean, *row.against[key].relative_bias)))


def _why_empty(rows: Sequence[Row], key: str, on_policy: bool) -> str:
    if key == "sequence" and not on_policy:
        return "the student's own law did not sample:\nthe sequence reverse KL's gradient is not known"
    told = any(math.isfinite(row.against[key].relative_bias.mean) for row in rows)
    what = "no estimator's gradient\ncan be told" if told else f"the {key} reverse KL's gradient\ncannot be told"
    return f"{what} from zero: measure more units"


def _reach(row: Row) -> float:
    """Say how far to the right the row goes, as far as that is known."""
    noise = _inverse(row.signal_to_noise)
    return noise.high if math.isfinite(noise.high) else noise.mean


def _point(ax: Axes, row: Row, key: str, number: int, far: float) -> Any:
    """Draw an estimator, with an arrow to `far` where its noise has no upper end, and return its legend handle."""
    noise, bias, looks = _inverse(row.signal_to_noise), row.against[key].relative_bias, look(number)
    bars = {"color": looks["color"], "linewidth": 1, "capsize": 2}
    bounded = math.isfinite(noise.high)
    if not bounded:
        ax.errorbar(noise.mean, bias.mean, xerr=[[0.0], [far - noise.mean]], xlolims=True, fmt="none", zorder=1, **bars)
    return ax.errorbar(
        noise.mean, bias.mean, xerr=[[noise.mean - noise.low], [noise.high - noise.mean if bounded else 0.0]],
        yerr=[[bias.mean - bias.low], [bias.high - bias.mean]], fmt=looks["marker"], label=row.label, markersize=6,
        **bars,
    )  # fmt: skip


def _inverse(ratio: Interval) -> Interval:
    """Invert a positive ratio, with an infinite upper end where the lower end of the ratio is not above zero."""
    if ratio.mean <= 0:
        return Interval(math.inf, math.inf, math.inf)
    return Interval(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)
