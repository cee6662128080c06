"""Bias against noise, and the direction of every estimator, in one picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.metrics import Interval

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*Xph<>d"


def draw(measurement: Measurement, file: Path) -> Path:
    """Write the picture: bias against both targets over the prompts that one signal needs.

    Args:
        measurement: what was found.
        file: a PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), sharex=True, layout="constrained")
    for axis, key in zip(axes, ("local", "sequence"), strict=True):
        shown = [_point(axis, row, key, number) for number, row in enumerate(measurement.rows)]
        if not any(shown):
            text = f"the {key} reverse KL's gradient\ncannot be told from zero: measure more units"
            axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes)
        axis.set_title(f"against the {key} reverse KL")
        axis.set_xlabel("noise / signal: prompts until they are equal")
        axis.set_xscale("log")
        axis.set_ylim(bottom=-0.03)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bias, relative to the target's norm")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def _point(axis: Any, row: Row, key: str, number: int) -> bool:
    """Draw an estimator; False, and nothing drawn, where its bias or its signal cannot be told."""
    noise, bias = _inverse(row.signal_to_noise), row.against[key].relative_bias
    if not all(map(math.isfinite, (noise.mean, *bias))):
        return False
    axis.errorbar(
        noise.mean, bias.mean, xerr=[[noise.mean - noise.low], [max(0.0, min(noise.high, 1e6) - noise.mean)]],
        yerr=[[bias.mean - bias.low], [bias.high - bias.mean]], fmt=MARKERS[number % len(MARKERS)],
        color=COLOURS[number % len(COLOURS)], label=row.label, markersize=6, linewidth=1, capsize=2,
    )  # fmt: skip
    return True


def _inverse(ratio: Interval) -> Interval:
    """Of a positive ratio; its upper end is infinite where the lower end of the ratio is not above zero."""
    if ratio.mean <= 0:
        return Interval(math.inf, math.inf, math.inf)
    return Interval(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)
