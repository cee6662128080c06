"""The figures of a report, as PNG: differences with intervals, learning curves with bands, quality against cost.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, without the yellow, too pale for lines; markers
and, past seven variants, line styles say the same once more. Widths are those of a README page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_opd.lab.compare.accounting import COSTS
from lit_opd.lab.compare.ranking import NOT_DISTINGUISHABLE, Ranking, Row
from lit_opd.lab.compare.records import Point
from lit_opd.lab.compare.report import Report
from lit_opd.measures.table import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "draw_differences", "draw_pareto"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
WIDTH, DPI = 8.0, 200
LEGEND_CHARACTERS = 88
GREY = "0.45"


def draw_differences(ranking: Ranking, confidence: float) -> bytes:
    """Each variant's paired difference to the one with the best mean, with its interval.

    Args:
        ranking: with a direction.
        confidence: of its intervals.

    Returns:
        A PNG.
    """
    yardstick, best = describe(ranking.yardstick), ranking.rows[0].variant
    pairs = {pair.second: pair for pair in ranking.pairs if pair.first == best}
    rows = [row for row in ranking.rows if row.variant in pairs]
    with _style():
        figure = _figure(1.3 + 0.34 * len(rows))
        ax = figure.subplots()
        for place, row in enumerate(rows):
            shown, tied = pairs[row.variant].difference, not pairs[row.variant].distinguishable
            # Second minus best, so that the axis reads as what is lost or gained by not taking the best.
            ends = [-shown.mean if end is None else -end for end in (shown.high, shown.low)]
            colour = GREY if tied else COLOURS[1]
            ax.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            ax.plot(-shown.mean, place, "o", color=colour, markerfacecolor="white" if tied else colour, markersize=7,
                    markeredgewidth=1.8)  # fmt: skip
        ax.axvline(0, color=COLOURS[0], linewidth=1.5)
        ax.set_yticks(range(len(rows)), [_plain(row.variant) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(axis="x", alpha=0.25)
        ax.set_xlabel(f"{yardstick.axis}: difference to {_plain(best)}, paired, {100 * confidence:g} % interval")
        side = "right" if yardstick.better == "lower" else "left"
        ax.set_title(f"{side} of the line is worse; open grey: {NOT_DISTINGUISHABLE} from {_plain(best)}", fontsize=10,
                     loc="left")  # fmt: skip
        return _png(figure)


def draw_curves(report: Report, yardstick: str) -> bytes:
    """Learning curves over steps, tokens and seconds: lines are means over seeds, bands go from the least to the most.

    Args:
        report: with curves of the yardstick.
        yardstick: its name.

    Returns:
        A PNG.
    """
    drawn = {variant: curves for variant in report.variants if (curves := _curves(report, yardstick, variant))}
    with _style():
        figure = _figure(3.1 + _legend_height(list(drawn)))
        panels = figure.subplots(1, len(COSTS), sharey=True)
        for ax, (cost, words) in zip(panels, COSTS.items(), strict=True):
            for variant, curves in drawn.items():
                _draw_curve(ax, curves, cost, report.variants.index(variant))
            ax.set_xlabel(words)
            ax.xaxis.set_major_formatter(_thousands())
            ax.xaxis.set_major_locator(_few_ticks())
            ax.grid(alpha=0.25)
        values = [point.value for curves in drawn.values() for curve in curves for point in curve]
        if not describe(yardstick).is_share and min(values) > 0 and max(values) > 30 * min(values):
            panels[0].set_yscale("log")
        panels[0].set_ylabel(_axis(yardstick))
        _legend(figure, report.variants, list(drawn), lines=True)
        return _png(figure)


def draw_pareto(report: Report, yardstick: str) -> bytes:
    """Final quality against cost in tokens and seconds; variants that no other beats in both are filled and joined.

    Bars go from the least seed to the most: intervals hold what prompts differ by, which is the same for all variants.

    Args:
        report: with costs and fronts of the yardstick.
        yardstick: its name.

    Returns:
        A PNG.
    """
    ranking = next(ranking for ranking in report.rankings if ranking.yardstick == yardstick)
    fronts = [front for front in report.fronts if front.yardstick == yardstick]
    costs = {cost.variant: cost for cost in report.costs}
    drawn = [variant for variant in report.variants if any(row.variant == variant for row in ranking.rows)]
    rows = {row.variant: row for row in ranking.rows}
    with _style():
        figure = _figure(3.3 + _legend_height(drawn))
        panels = figure.subplots(1, len(fronts), sharey=True, squeeze=False)[0]
        for ax, front in zip(panels, fronts, strict=True):
            spent = {variant: getattr(costs[variant], front.cost) for variant in drawn}
            steps = [(spent[variant], rows[variant].mean.mean) for variant in front.variants]
            ax.step(*zip(*steps, strict=True), where="post", color=GREY, linewidth=1.5, linestyle="--", zorder=1)
            for variant in drawn:
                if spent[variant] is not None:
                    index = report.variants.index(variant)
                    _draw_point(ax, spent[variant], rows[variant], index, filled=variant in front.variants)
            ax.set_xlabel(f"{COSTS[front.cost]}, mean of runs")
            ax.xaxis.set_major_formatter(_thousands())
            ax.xaxis.set_major_locator(_few_ticks())
            ax.margins(x=0.12)
            ax.grid(alpha=0.25)
        panels[0].set_ylabel(_axis(yardstick))
        figure.suptitle("filled and joined: no other variant is better at no more cost", fontsize=10, x=0.01, ha="left")
        _legend(figure, report.variants, drawn, lines=False)
        return _png(figure)


def _draw_curve(ax: Axes, curves: Sequence[Sequence[Point]], cost: str, index: int) -> None:
    common = set.intersection(*({point.step for point in curve} for curve in curves))
    rows = [[point for point in curve if point.step in common] for curve in curves]
    spent = np.array([[getattr(point, cost) for point in row] for row in rows]).mean(0)
    values = np.array([[point.value for point in row] for row in rows])
    look = _look(index)
    ax.fill_between(spent, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)
    every = max(1, math.ceil(len(spent) / 6))
    # Markers of different variants start at different points, so that none hides another.
    ax.plot(spent, values.mean(0), linewidth=1.7, markersize=4.5, markevery=(index % every, every), **look)


def _draw_point(ax: Axes, spent: float, row: Row, index: int, *, filled: bool) -> None:
    look = _look(index)
    ax.plot([spent, spent], [min(row.by_seed), max(row.by_seed)], color=look["color"], linewidth=1.5, zorder=2)
    ax.plot(spent, row.mean.mean, linestyle="none", marker=look["marker"], color=look["color"], markersize=9, zorder=3,
            markerfacecolor=look["color"] if filled else "white", markeredgewidth=1.8)  # fmt: skip


def _curves(report: Report, yardstick: str, variant: str) -> list[list[Point]]:
    found = [c.points for c in report.curves if c.yardstick == yardstick and c.variant == variant]
    # A value that is not finite cannot be drawn.
    finite = [[point for point in points if math.isfinite(point.value)] for points in found]
    return [points for points in finite if points]


def _look(index: int) -> dict[str, Any]:
    line = LINES[index // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": line}


def _axis(yardstick: str) -> str:
    described = describe(yardstick)
    return f"{described.axis},\n{described.better} is better" if described.better else described.axis


def _plain(text: str) -> str:
    # A dollar begins mathematics, and a leading underscore hides an entry of a legend.
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _columns(names: Sequence[str]) -> int:
    longest = max(map(len, names), default=1) + 6
    return max(1, min(len(names), LEGEND_CHARACTERS // longest))


def _legend_height(names: Sequence[str]) -> float:
    return 0.24 * math.ceil(len(names) / _columns(names))


def _legend(figure: Figure, variants: Sequence[str], names: Sequence[str], *, lines: bool) -> None:
    from matplotlib.lines import Line2D

    looks = [_look(variants.index(name)) | ({} if lines else {"linestyle": "none"}) for name in names]
    handles = [Line2D([], [], linewidth=1.7, markersize=6, **look) for look in looks]
    figure.legend(
        handles,
        [_plain(name) for name in names],
        loc="outside lower center",
        ncols=_columns(names),
        frameon=False,
        fontsize=10,
    )


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _thousands() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=DPI)
    return target.getvalue()
