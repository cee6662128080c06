"""Picture of what `markov` found."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from markov import ESTIMATORS
from matplotlib.lines import Line2D

from lit_opd import estimators

# Okabe and Ito's palette; markers say the same once more.
LOOKS = {
    ("sequence_reverse_kl", True): ("#D55E00", "D", "unbiased for the sequence's reverse KL"),
    ("reverse_kl", True): ("#0072B2", "o", "unbiased for each position's reverse KL"),
    (None, False): ("0.45", "x", "unbiased for neither"),
}


def draw_map(found: dict[str, Any], path: Path) -> None:
    """Draw the variance of every estimator, a point a seed, with its measured bias against the sequence's gradient.

    Args:
        found: by `markov.measure`.
        path: of the picture.
    """
    labels = sorted(ESTIMATORS, key=lambda label: mean(c[label]["trace_variance"] for c in found["chains"]))
    figure, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for place, label in enumerate(labels):
        colour, marker, _ = _look(label)
        variances = [chain[label]["trace_variance"] for chain in found["chains"]]
        ax.plot(variances, [place] * len(variances), marker, color=colour, markersize=6, linestyle="none")
    ax.set_yticks(range(len(labels)), labels, fontsize=9)
    ax.set_xscale("log")
    ax.set_xlabel(r"variance of one completion's gradient (trace, nats$^2$), a point a seed")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=c, marker=m, linestyle="none", label=text) for c, m, text in LOOKS.values()]
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    size = found["settings"]
    title = f"Markov model, {size['vocabulary']} tokens, {size['horizon']} positions"
    ax.set_title(f"{title}; {size['group']} completions a prompt where they are compared", fontsize=10.5)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _look(label: str) -> tuple[str, str, str]:
    name, keywords = ESTIMATORS[label]
    contract = estimators.build(name, **keywords).contract
    return LOOKS.get((contract.target, contract.unbiased), LOOKS[None, False])
