"""Draw learning curves over what they cost.

`document` calls this, and so does `tools/make_results.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lit_opd.lab.compare.collect import Point
from lit_opd.lab.compare.digest import SPENDINGS, Curve
from lit_opd.measures.drawing import figure, look, plain, png, style
from lit_opd.measures.table import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curves"]

WIDTH = 8.0
LEGEND_CHARACTERS = 88


def draw_curves(curves: Sequence[Curve], variants: Sequence[str], yardstick: str) -> bytes | None:
    """Draw learning curves, if any, as PNG over steps, tokens and seconds: means over seeds, bands over all."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    found = {name: runs for name in variants if (runs := _finite(curves, name, yardstick))}
    if not found:
        return None
    columns = max(1, min(len(found), LEGEND_CHARACTERS // (6 + max(map(len, found)))))
    described, values = describe(yardstick), [p.value for runs in found.values() for run in runs for p in run]
    with style():
        drawn = figure(WIDTH, 3.1 + 0.24 * math.ceil(len(found) / columns))
        panels = drawn.subplots(1, len(SPENDINGS), sharey=True)
        for ax, (cost, words) in zip(panels, SPENDINGS.items(), strict=True):
            for name, runs in found.items():
                _draw_curve(ax, runs, cost, name, variants.index(name))
            ax.set_xlabel(words)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            ax.grid()
        if not described.is_share and min(values) > 0 and max(values) > 30 * min(values):
            panels[0].set_yscale("log")
        panels[0].set_ylabel(described.axis + (f",\n{described.better} is better" if described.better else ""))
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
        return png(drawn)


def _draw_curve(ax: Axes, runs: Sequence[Sequence[Point]], cost: str, name: str, number: int) -> None:
    common = set.intersection(*({point.step for point in run} for run in runs))
    rows = [[point for point in run if point.step in common] for run in runs]
    spent = np.array([[getattr(point, cost) for point in row] for row in rows]).mean(0)
    values = np.array([[point.value for point in row] for row in rows])
    looks, every = look(number), max(1, math.ceil(len(spent) / 6))
    ax.fill_between(spent, values.min(0), values.max(0), color=looks["color"], alpha=0.15, linewidth=0)
    # Markers of different variants start at different points, so that none hides another.
    places = (number % every, every)
    ax.plot(spent, values.mean(0), linewidth=1.7, markersize=4.5, markevery=places, label=plain(name), **looks)


def _finite(curves: Sequence[Curve], variant: str, yardstick: str) -> list[list[Point]]:
    """Choose the runs of a variant, without the points that cannot be drawn."""
    found = [curve.points for curve in curves if (curve.yardstick, curve.variant) == (yardstick, variant)]
    finite = [[point for point in points if math.isfinite(point.value)] for points in found]
    return [points for points in finite if points]
