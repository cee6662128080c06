"""Draw where every seed of every variant ended.

`document` calls this for the figure on a report's first screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lit_opd.lab.compare.analysis import COLLAPSED, Analysis, Row
from lit_opd.measures.drawing import GREY, figure, look, plain, png, style
from lit_opd.measures.table import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_seeds"]

WIDTH, MOST_PANELS = 8.0, 3
ROOM = 50  # times the least of an axis: up to there labels at 1, 2 and 5 of a decade do not meet


def draw_seeds(metrics: Mapping[str, Analysis], variants: list[str], untrained: Mapping[str, float]) -> bytes | None:
    """Draw the first yardsticks with a direction as PNG: a dot a seed, a bar for the interval of the mean.

    Args:
        metrics: the analyses.
        variants: in the order that gives each its colour.
        untrained: what the student had before training, drawn as a line.
    """
    shown = {name: found for name, found in metrics.items() if found.better and any(row.by_seed for row in found.rows)}
    shown = dict(list(shown.items())[:MOST_PANELS])
    if not shown:
        return None
    order = [row.variant for row in next(iter(shown.values())).rows]
    order += [name for name in variants if name not in order]
    with style(9):
        drawn = figure(WIDTH, 0.9 + 0.24 * len(order))
        panels = drawn.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, (name, found) in zip(panels, shown.items(), strict=True):
            for row in found.rows:
                _draw_row(ax, row, order.index(row.variant), variants.index(row.variant))
            if name in untrained:
                ax.axvline(untrained[name], color=GREY, linewidth=0.8, linestyle="--")
            if found.scale == "log":
                _scale_by_logarithms(ax)
            ax.set_title(plain(describe(name).label) + f", {found.better} is better", fontsize=9)
            ax.grid(axis="x")
        panels[0].set_yticks(range(len(order)), [plain(name) for name in order])
        panels[0].set_ylim(len(order) - 0.5, -0.5)
        return png(drawn)


def _scale_by_logarithms(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < ROOM * low else (1,), numticks=7))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_row(ax: Axes, row: Row, place: int, number: int) -> None:
    colour = GREY if row.verdict == COLLAPSED else look(number)["color"]
    values = [value for value in row.by_seed.values() if math.isfinite(value)]
    if row.low is not None and row.high is not None and math.isfinite(row.high):
        ax.plot([row.low, row.high], [place, place], color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt")
    ax.plot(values, [place] * len(values), marker="o", linestyle="", markersize=4.5, color=colour, alpha=0.9)
