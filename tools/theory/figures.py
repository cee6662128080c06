"""Pictures of what `control` and `growth` found."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from growth import completion_bound, on_policy_bound
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from summary import REACHED

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say the same once more.
COLOURS = {0.0: "#0072B2", 0.25: "#56B4E9", 0.5: "#009E73", 0.75: "#E69F00", 1.0: "#D55E00"}
MARKERS = {0.0: "o", 0.25: "v", 0.5: "s", 0.75: "^", 1.0: "D"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
GROWTH_PANELS = {
    "the teacher's tokens (off-policy)": {"teacher_samples": "-"},
    "the student's tokens, worst order": {"student_samples": "-"},
    "the student's tokens, random tables": {"random": "-", "near": ":"},
}


def draw_growth(found: dict, path: Path) -> None:
    """Draw second moments over the length, with their bounds.

    Args:
        found: by `growth.measure`.
        path: of the picture.
    """
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.6), layout="constrained", sharey=True)
    lengths, (first, last) = found["lengths"], found["fitted"]
    for ax, (title, cases) in zip(axes, GROWTH_PANELS.items(), strict=True):
        _draw_bounds(ax, lengths, on_policy="teacher_samples" not in cases)
        for name, line in cases.items():
            for row in found["cases"][name]["rows"]:
                if row["gamma"] in (0.0, 1.0):
                    _draw_moments(ax, lengths, row, line, name)
        ax.set_title(title, fontsize=10.5)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(1e-2, 1e13)
        ax.set_xlabel("completion length T (tokens)")
        ax.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=9, loc="upper left")
    axes[0].set_ylabel(r"second moment $E\,\Vert g\Vert^2\;/\;(B_r^2 B_s^2)$")
    handles = [Line2D([], [], color="0.45", linestyle=line, linewidth=1.2) for line in ("--", "-.")]
    labels = [r"bounds on any completion, $T^2$ ($\gamma$ = 0) and $T^4$ ($\gamma$ = 1): the worst one meets them",
              r"bound on the student's mean, $T^3$ ($\gamma$ = 1)"]  # fmt: skip
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Exact second moment of one completion's gradient; slopes fitted from T = {first} to {last}",
                    fontsize=11)  # fmt: skip
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _draw_bounds(ax: Axes, lengths: list[int], on_policy: bool) -> None:
    bounds = [("--", "$T^2$", completion_bound, 0.0), ("--", "$T^4$", completion_bound, 1.0)]
    if on_policy:
        bounds.append(("-.", "$T^3$", on_policy_bound, 1.0))
    for line, order, bound, gamma in bounds:
        values = [bound(length, gamma) for length in lengths]
        ax.plot(lengths, values, color="0.45", linestyle=line, linewidth=1.2, zorder=1)
        ax.annotate(order, (lengths[-1], values[-1]), (4, 0), textcoords="offset points", color="0.3", fontsize=9,
                    va="center", annotation_clip=False)  # fmt: skip


def _draw_moments(ax: Axes, lengths: list[int], row: dict, line: str, name: str) -> None:
    gamma = row["gamma"]
    curve = [geometric_mean(values) for values in zip(*row["moments"], strict=True)]
    slope = sum(row["slopes"]) / len(row["slopes"])
    label = rf"$\gamma$ = {gamma:g}{', near teacher' if name == 'near' else ''}: slope {slope:.2f}"
    ax.plot(lengths, curve, line, color=COLOURS[gamma], marker=MARKERS[gamma], markersize=4, linewidth=2, label=label)


def draw_control(found: dict, path: Path) -> None:
    """Draw the variance while training, at own students and at the same one, and where the students end.

    Args:
        found: by `summary.compare`.
        path: of the picture.
    """
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.4), layout="constrained")
    gammas, seeds = found["settings"]["gammas"], found["settings"]["seeds"]
    for ax, name in zip(axes, ("variance", "variance_same_student"), strict=False):
        for i, gamma in enumerate(gammas):
            _draw_variance(ax, found["probes"], name, i, gamma)
        ax.set_yscale("log")
        ax.set_xlabel("iterations")
    axes[0].set_ylabel("variance of the output layer's gradient (nats²)")
    axes[1].set_ylim(axes[0].get_ylim())
    axes[0].set_title(r"each $\gamma$ at its own student", fontsize=10.5)
    axes[1].set_title(rf"each $\gamma$ at the student of $\gamma$ = {gammas[0]:g}", fontsize=10.5)
    _draw_ends(axes[2], found)
    for ax in axes:
        ax.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(gammas), frameon=False)
    figure.suptitle(f"Two control tasks, one student; lines: geometric mean of {len(seeds)} seeds, bands: their range",
                    fontsize=11)  # fmt: skip
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _draw_variance(ax: Axes, probes: list[dict], name: str, index: int, gamma: float) -> None:
    iterations = [probe["iteration"] for probe in probes]
    values = [probe[name][index] for probe in probes]
    colour = COLOURS[gamma]
    ax.fill_between(iterations, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.13, linewidth=0)
    ax.plot(iterations, list(map(geometric_mean, values)), color=colour, marker=MARKERS[gamma], markersize=4,
            markevery=max(1, len(probes) // 8), linewidth=1.8, label=rf"$\gamma$ = {gamma:g}")  # fmt: skip


def _draw_ends(ax: Axes, found: dict) -> None:
    gammas = list(found["settings"]["gammas"])
    for end in found["ends"]:
        side = -0.13 if end["task"] == "left" else 0.13
        face = COLOURS[end["gamma"]] if end["task"] == "left" else "white"
        ax.plot(gammas.index(end["gamma"]) + side, end["distance"], MARKERS[end["gamma"]], markersize=6,
                color=COLOURS[end["gamma"]], markerfacecolor=face, markeredgewidth=1.5)  # fmt: skip
    ax.axhline(REACHED, color="0.35", linestyle="--", linewidth=1.2)
    ax.annotate("counts as reached below", (0, REACHED), (-14, 4), textcoords="offset points", fontsize=9, color="0.3")
    ax.set_yscale("log")
    ax.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    ax.set_xlabel(r"$\gamma$  (filled: left task, open: right)")
    ax.set_ylabel("mean distance from the target at the end")
    ax.set_title("final positions, a point a seed", fontsize=10.5)
