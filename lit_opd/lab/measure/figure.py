"""Bias against noise, and the direction of every estimator, in one picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.measures.intervals import Interval

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
LINE_WIDTH = 150  # letters that fit beside each other below the panels


def draw(measurement: Measurement, file: Path) -> Path:
    """Write the picture: bias against both targets over the prompts that one signal needs.

    Args:
        measurement: what was found.
        file: a PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = _compose(measurement.rows, measurement.on_policy)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def _compose(rows: Sequence[Row], on_policy: bool = True) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), sharex=True, layout="constrained")
    labels: dict[str, Any] = {}
    missing: dict[str, None] = {}
    for axis, key in zip(axes, ("local", "sequence"), strict=True):
        drawn = {number: row for number, row in enumerate(rows) if _can_be_drawn(row, key)}
        far = 3 * max((_reach(row) for row in drawn.values()), default=1.0)
        labels |= {row.label: _point(axis, row, key, number, far) for number, row in drawn.items()}
        missing |= dict.fromkeys(row.label for number, row in enumerate(rows) if drawn and number not in drawn)
        if not drawn:
            axis.text(0.5, 0.5, _why_empty(rows, key, on_policy), ha="center", transform=axis.transAxes)
        axis.set_title(f"against the {key} reverse KL")
        axis.set_xlabel("noise / signal: prompts until they are equal")
        axis.set_xscale("log")
        axis.set_ylim(bottom=-0.03)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bias, relative to the target's norm")
    if missing:
        text = f"not drawn, cannot be told from zero: {', '.join(missing)}"
        figure.supxlabel(textwrap.fill(text, LINE_WIDTH), fontsize=8)
    order = [row.label for row in rows if row.label in labels]
    handles = [labels[label] for label in order]
    figure.legend(handles, order, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _can_be_drawn(row: Row, key: str) -> bool:
    return all(map(math.isfinite, (_inverse(row.signal_to_noise).mean, *row.against[key].relative_bias)))


def _why_empty(rows: Sequence[Row], key: str, on_policy: bool) -> str:
    if key == "sequence" and not on_policy:
        return "the student's own law did not sample:\nthe sequence reverse KL's gradient is not known"
    told = any(math.isfinite(row.against[key].relative_bias.mean) for row in rows)
    what = "no estimator's gradient\ncan be told" if told else f"the {key} reverse KL's gradient\ncannot be told"
    return f"{what} from zero: measure more units"


def _reach(row: Row) -> float:
    """How far to the right the row goes, as far as that is known."""
    noise = _inverse(row.signal_to_noise)
    return noise.high if math.isfinite(noise.high) else noise.mean


def _point(axis: Any, row: Row, key: str, number: int, far: float) -> Any:
    """Draw an estimator; an arrow to `far` where its noise has no upper end. Returns what stands for it in a legend."""
    noise, bias = _inverse(row.signal_to_noise), row.against[key].relative_bias
    colour, bounded = COLOURS[number % len(COLOURS)], math.isfinite(noise.high)
    # Where the colours begin again, markers are open and lines dashed; after that, each has another marker.
    again = number // len(COLOURS)
    filled = again % 2 == 0
    looks = {"color": colour, "linewidth": 1, "capsize": 2}
    right = noise.high - noise.mean if bounded else 0.0
    drawn = axis.errorbar(
        noise.mean, bias.mean, xerr=[[noise.mean - noise.low], [right]],
        yerr=[[bias.mean - bias.low], [bias.high - bias.mean]], fmt=MARKERS[(number + again // 2) % len(MARKERS)],
        markerfacecolor=colour if filled else "white", label=row.label, markersize=6, **looks,
    )  # fmt: skip
    bars = [*drawn.lines[2]]
    if not bounded:
        arrow = axis.errorbar(
            noise.mean, bias.mean, xerr=[[0.0], [far - noise.mean]], xlolims=True, fmt="none", zorder=1, **looks
        )
        bars += arrow.lines[2]
    for bar in bars:
        bar.set_linestyle("-" if filled else "--")
    return drawn


def _inverse(ratio: Interval) -> Interval:
    """Of a positive ratio; its upper end is infinite where the lower end of the ratio is not above zero."""
    if ratio.mean <= 0:
        return Interval(math.inf, math.inf, math.inf)
    return Interval(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)
