"""Pictures of an evaluation, as PNG: curves over completion positions with bands, and the histogram of log-ratios.

Colours are three of Tol's, which colour-blind readers can tell apart; line styles say the same once more. Red is where
the student gives more than the teacher, as in `page`.
Widths are those of a README page.
"""

from __future__ import annotations

import io
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lit_opd.measures.histogram import SCALE, Histogram
from lit_opd.measures.positions import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["QUANTILES", "draw_log_ratios", "draw_positions"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BLUE, RED, TEAL, GREY = "#0077BB", "#CC3311", "#009988", "0.45"
LOOKS = ((BLUE, "-"), (RED, "--"), (TEAL, "-."))
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # looking for a place that nothing else takes costs a third of the drawing
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
WIDTH, DPI = 9.0, 100
# With fewer prompts a mean moves too much to set the scale by its band.
FEW_PROMPTS = 8
# Bins of the histogram that are drawn as one.
MERGED = 4


class Panel(NamedTuple):
    """One of the small pictures: a title, the unit of its axis, and which values it shows under which labels."""

    title: str
    unit: str
    lines: dict[str, str]
    zero: bool = False


def panels(support_size: int) -> list[Panel]:
    """What is shown of the curves, in the order of reading."""
    top = f"top {support_size}"
    return [
        Panel("reverse KL(student ‖ teacher)", "nats", {"reverse_kl": ""}, zero=True),
        Panel("log-ratio of own tokens: student − teacher", "nats", {"log_ratio": ""}, zero=True),
        Panel("entropy", "nats", {"student_entropy": "student", "teacher_entropy": "teacher"}),
        Panel("entropy gap: student − teacher", "nats", {"entropy_gap": ""}, zero=True),
        Panel("teacher's negative log-likelihood of own tokens", "nats", {"teacher_nll": ""}),
        Panel("most probable tokens", "share", {"overlap": f"overlap of both {top}",
              "student_mass": f"student's mass on teacher's {top}", "teacher_mass": "teacher's mass on them"}),
        Panel("log-ratio of stopping here: student − teacher", "nats", {"stop_log_ratio": ""}, zero=True),
    ]  # fmt: skip


def draw_positions(curves: Curves, title: str, support_size: int) -> bytes:
    """Small pictures of every value over the position in the completion, with bands.

    Args:
        curves: of an evaluation.
        title: whose, and when.
        support_size: how many most probable tokens were compared.

    Returns:
        A PNG.
    """
    with _style():
        figure = _figure(10.4)
        axes = figure.subplots(4, 2, sharex=True).ravel()
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.05, top=0.915, wspace=0.17, hspace=0.27)
        for ax, panel in zip(axes, panels(support_size), strict=False):
            _draw_panel(ax, curves, panel)
        _draw_alive(axes[-1], curves)
        axes[0].xaxis.set_major_locator(_whole_ticks())
        for ax in axes[-2:]:
            ax.set_xlabel("position in the completion, tokens")
        note = f"mean over tokens; bands: {100 * curves.confidence:g} % interval over prompts; " \
               f"dotted: fewer than {FEW_PROMPTS} prompts"  # fmt: skip
        figure.suptitle(f"{title}\n{note}", fontsize=10.5, x=0.012, y=0.992, ha="left")
        return _png(figure)


def draw_log_ratios(found: Histogram, title: str) -> bytes:
    """How many of the student's own tokens have which log-ratio.

    Args:
        found: log-ratios of an evaluation.
        title: whose, and when.

    Returns:
        A PNG.
    """
    with _style():
        figure = _figure(4.3)
        ax = figure.subplots()
        figure.subplots_adjust(left=0.075, right=0.985, bottom=0.115, top=0.825)
        reach = _reach(found)
        inside = found.counts[1:-1].reshape(-1, MERGED).sum(1)
        edges = np.arcsinh(found.edges[::MERGED] / SCALE)
        middle = len(inside) // 2
        ax.stairs(inside[:middle], edges[: middle + 1], fill=True, color=BLUE, label="the teacher gives more")
        ax.stairs(inside[middle:], edges[middle:], fill=True, color=RED, label="the student gives more")
        for share in QUANTILES if found.counts.any() else ():
            at = np.arcsinh(np.clip(found.quantile(share), -reach, reach) / SCALE)
            ax.axvline(at, color="black", linewidth=1.6 if share == 0.5 else 0.8, linestyle=":")
        ax.set_yscale("log")
        ax.set_ylim(0.7, max(10, 1.6 * inside.max()))
        _label_asinh(ax, reach)
        ax.set_ylabel("tokens")
        ax.set_xlabel("log-ratio, student − teacher, nats (linear within 0.01, logarithmic beyond)")
        ax.grid(alpha=0.25)
        figure.legend(loc="upper right", bbox_to_anchor=(0.985, 1.0), ncols=2, frameon=False, borderaxespad=0.2)
        figure.suptitle(f"{title}\n{_sentences(found)}", fontsize=10, x=0.012, y=0.98, ha="left")
        return _png(figure)


def _sentences(found: Histogram) -> str:
    tokens = int(found.counts.sum())
    if not tokens:
        return "no token was measured"
    marks = ",  ".join(f"{100 * share:g} %: {_number(found.quantile(share))}" for share in QUANTILES)
    top = found.top_share()
    held = "all are 0" if math.isnan(top) else f"the 1 % with the largest |log-ratio| hold {100 * top:.0f} % of its sum"
    beyond = int(found.counts[0] + found.counts[-1])
    outside = f"; {beyond} beyond ±{found.edges[-1]:g}" if beyond else ""
    return f"{tokens} tokens from {_number(found.least)} to {_number(found.largest)}; {held}{outside}\n" \
           f"quantiles (dotted)  {marks}"  # fmt: skip


def _number(value: float) -> str:
    # Adding zero takes the sign from a negative one.
    return (f"{round(value, 3) + 0.0:.3f}" if abs(value) < 10 else f"{value:.1f}").replace("-", "−")


def _draw_panel(ax: Axes, curves: Curves, panel: Panel) -> None:
    sure, marker = curves.prompts >= FEW_PROMPTS, "." if len(curves.counts) <= 64 else ""
    unsure = ~sure | ~np.append(sure[1:], True)  # with the end of what is sure, so that lines join
    values = [np.zeros(1)] if panel.zero else []
    for (name, label), (colour, line) in zip(panel.lines.items(), LOOKS, strict=False):
        mean, low, high = (table[name] for table in (curves.means, curves.lows, curves.highs))
        banded = np.isfinite(low)
        ax.fill_between(curves.middles, low, high, where=banded, color=colour, alpha=0.18, linewidth=0)
        for part, style, width in ((sure, line, 1.6), (unsure, ":", 1.1)):
            shown = np.where(part, mean, np.nan)
            ax.plot(curves.middles, shown, color=colour, linestyle=style, linewidth=width, marker=marker, markersize=4,
                    label=label if part is sure else None)  # fmt: skip
        values += [mean[np.isfinite(mean)], low[banded & sure], high[banded & sure]]
    if not any(np.isfinite(curves.means[name]).any() for name in panel.lines):
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes, color=GREY)
    elif panel.unit == "share":
        ax.set_ylim(0, 1.04)
    else:
        least, most = np.concatenate(values).min(), np.concatenate(values).max()
        room = 0.07 * (most - least) or 0.05
        ax.set_ylim(least - room, most + room)
        if panel.zero:
            ax.axhline(0, color=GREY, linewidth=0.9)
    ax.locator_params(axis="y", nbins=4)
    ax.set_title(f"{panel.title}, {panel.unit}")
    ax.grid(alpha=0.25)
    if any(panel.lines.values()):
        ax.legend(frameon=False, fontsize=8.5)


def _draw_alive(ax: Axes, curves: Curves) -> None:
    last = max(1, int(np.count_nonzero(curves.counts)))
    ends = curves.starts[: last + 1] + 0.5
    ax.stairs(curves.counts[:last] / np.diff(curves.starts[: last + 1]), ends, fill=True, color=GREY, alpha=0.5)
    ax.set_xlim(ends[0], ends[-1])
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(_whole_ticks())
    ax.set_title("completions that have not ended, count")
    ax.grid(alpha=0.25)


def _reach(found: Histogram) -> float:
    """The end of the axis: round numbers, so that pictures of several steps have the same."""
    most = max(abs(found.least), abs(found.largest)) if found.counts.any() else 0.0
    return next((end for end in (1.0, 3.0, 10.0, 30.0) if end >= most), float(found.edges[-1]))


def _label_asinh(ax: Axes, reach: float) -> None:
    ends = [end for end in (0.01, 0.1, 1.0, 10.0, 100.0) if end <= 1.001 * reach]
    ticks = [*(-end for end in reversed(ends)), 0.0, *ends]
    ax.set_xticks(np.arcsinh(np.array(ticks) / SCALE), [f"{tick:g}".replace("-", "−") for tick in ticks])
    ax.set_xlim(*np.arcsinh(np.array([-reach, reach]) / SCALE))


def _whole_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True, min_n_ticks=1)


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    return target.getvalue()
