"""Draw an evaluation as PNG: curves over completion positions with bands, and the histogram of log-ratios.

Why here: `figures` leaves both in the MLflow run. Blue is where the teacher gives more than the student, orange
where the student does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lit_opd.measures.drawing import COLOURS, GREY, figure, look, png, style
from lit_opd.measures.histogram import SCALE, Histogram
from lit_opd.measures.positions import Curves
from lit_opd.measures.table import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["QUANTILES", "draw_log_ratios", "draw_positions"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# What each small picture shows, in the order of reading.
PANELS = {
    "divergences (nats/token)": ("reverse_kl", "forward_kl", "jsd"),
    "log-ratio of own tokens (nats/token)": ("log_ratio",),
    "entropy (nats/token)": ("student_entropy", "teacher_entropy"),
    "entropy, student minus teacher (nats/token)": ("entropy_gap",),
    "teacher's negative log-likelihood (nats/token)": ("teacher_nll",),
    "the most probable tokens (share)": ("top1_agreement", "overlap", "student_mass", "teacher_mass"),
    "log-ratio of stopping here (nats)": ("stop_log_ratio",),
}
BLUE, ORANGE = COLOURS[:2]
# With fewer prompts a mean moves too much for a band.
FEW_PROMPTS = 8
# Bins of the histogram that are drawn as one.
MERGED = 4
TICKS = (-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100)


def draw_positions(curves: Curves, title: str, support_size: int) -> bytes:
    """Draw every value over the position in the completion, with bands, as PNG.

    The title says whose, and when, and `support_size` how many most probable tokens were compared.
    """
    with style(9.5):
        drawn = figure(9, 10.4, layout=None)
        axes = drawn.subplots(4, 2, sharex=True).ravel()
        drawn.subplots_adjust(left=0.07, right=0.985, bottom=0.05, top=0.915, wspace=0.17, hspace=0.27)
        for ax, (heading, names) in zip(axes, PANELS.items(), strict=False):
            _draw_panel(ax, curves, heading, names)
        _draw_alive(axes[-1], curves)
        for ax in axes[-2:]:
            ax.set_xlabel("position in the completion (tokens)")
        note = f"means over tokens, {curves.confidence:.0%} intervals over prompts, dotted where these are fewer than "
        note += f"{FEW_PROMPTS}; most probable: {support_size}"
        drawn.suptitle(f"{title}\n{note}", fontsize=10.5, x=0.012, y=0.992, ha="left")
        return png(drawn, dpi=100)


def _draw_panel(ax: Axes, curves: Curves, heading: str, names: tuple[str, ...]) -> None:
    sure = curves.prompts >= FEW_PROMPTS
    unsure = ~sure | ~np.append(sure[1:], True)  # with the end of what is sure, so that lines join
    for number, name in enumerate(names):
        mean, low, high = (table[name] for table in (curves.means, curves.lows, curves.highs))
        colour, line = look(number)["color"], ("-", "--", "-.", ":")[number]
        banded, at = sure & np.isfinite(low), curves.middles
        ax.fill_between(at, low, high, where=banded, color=colour, alpha=0.18, linewidth=0)
        ax.plot(at, np.where(sure, mean, np.nan), line, color=colour, label=describe(name).label)
        ax.plot(at, np.where(unsure, mean, np.nan), ":", color=colour, linewidth=1)
    ax.set_title(heading)
    ax.grid()
    if not any(np.isfinite(curves.means[name]).any() for name in names):
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes, color=GREY)
    elif "share" in heading:
        ax.set_ylim(0, 1.04)
    else:
        ax.axhline(0, color=GREY, linewidth=0.9)
    if len(names) > 1:
        ax.legend(frameon=False, fontsize=8)


def _draw_alive(ax: Axes, curves: Curves) -> None:
    last = max(1, int(np.count_nonzero(curves.counts)))
    starts = curves.starts[: last + 1]
    ax.stairs(curves.counts[:last] / np.diff(starts), starts + 0.5, fill=True, color=GREY, alpha=0.5)
    ax.set_xlim(starts[0] + 0.5, starts[-1] + 0.5)
    ax.set_ylim(bottom=0)
    ax.set_title("completions that have not ended (count)")
    ax.grid()


def draw_log_ratios(found: Histogram, title: str) -> bytes:
    """Draw as PNG how many of the student's own tokens have which log-ratio, and mark quantiles."""
    with style(9.5):
        drawn = figure(9, 4.3, layout=None)
        ax = drawn.subplots()
        drawn.subplots_adjust(left=0.075, right=0.985, bottom=0.115, top=0.825)
        counts, edges = found.counts[1:-1].reshape(-1, MERGED).sum(1), found.edges[::MERGED]
        middle = len(counts) // 2
        ax.stairs(counts[:middle], edges[: middle + 1], fill=True, color=BLUE, label="the teacher gives more")
        ax.stairs(counts[middle:], edges[middle:], fill=True, color=ORANGE, label="the student gives more")
        for share in QUANTILES if found.counts.any() else ():
            ax.axvline(found.quantile(share), color="black", linewidth=1.6 if share == 0.5 else 0.8, linestyle=":")
        ax.set_xscale("asinh", linear_width=SCALE)
        ax.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        ax.set_xlim(edges[0], edges[-1])
        ax.set_yscale("log")
        ax.set_ylim(0.7, max(10, 1.6 * counts.max()))
        ax.set_ylabel("tokens")
        ax.set_xlabel("log-ratio, student minus teacher (nats; linear within 0.01, logarithmic beyond)")
        ax.grid()
        drawn.legend(loc="upper right", ncols=2, frameon=False)
        drawn.suptitle(f"{title}\n{_sentences(found)}", fontsize=10, x=0.012, y=0.98, ha="left")
        return png(drawn, dpi=100)


def _sentences(found: Histogram) -> str:
    tokens, top = int(found.counts.sum()), found.top_share()
    if not tokens:
        return "no token was measured"
    held = "all are 0" if math.isnan(top) else f"the 1 % with the largest |log-ratio| hold {top:.0%} of its sum"
    beyond = f"; {found.counts[0] + found.counts[-1]} beyond ±{found.edges[-1]:g}"
    marks = ", ".join(f"{share:.0%}: {found.quantile(share):.3g}" for share in QUANTILES)
    return f"{tokens} tokens from {found.least:.3g} to {found.largest:.3g}; {held}{beyond}\nquantiles (dotted): {marks}"
