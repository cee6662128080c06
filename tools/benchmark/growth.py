"""How time and memory of our step grow with its tokens: W1 with completions of 32 to 256 tokens, three doublings.

Twice: with the default budget of a micro-batch, into which all rows fit, so that their activations grow; and with
the budget of the shortest completions, which keeps them as they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tools.benchmark import report, roofline
from tools.benchmark.processes import run
from tools.benchmark.report import Options
from tools.benchmark.workloads import STUDENT, WORKLOADS, Workload, make_job, prepare_models

LENGTHS = (32, 64, 128, 256)
BUDGETS = {"default": None, "fixed": 1024}
# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say the same once more.
STYLE = {"default": ("#0072B2", "o", "one micro-batch"), "fixed": ("#D55E00", "s", "micro-batches of 1024 tokens")}


def measure(options: Options) -> None:
    """Run every length with either budget, and write and draw what came of it."""
    prepare_models()
    rows = []
    for number in range(1, options.rounds + 1):
        for name, workload in workloads(LENGTHS[:2] if options.quick else LENGTHS).items():
            found = run("tools.benchmark.ours", make_job(workload, options.steps))
            row = report.summarise({"side": name, "round": number, **found})
            told = row.get("failed") or "{step_s:.2f} s, {peak_mb:.0f} MB".format(**row)
            print(f"round {number}, {name} tokens: {told}", flush=True)
            rows.append(row)
    medians = report.by_side(rows)
    draw(medians, roofline.read_geometry(STUDENT).vocabulary, options.out / "benchmark_growth.png")
    results = {"what": options.what, "machine": report.machine(), "rows": rows}
    table = report.table(medians, ["side", "runs"], report.COLUMNS)
    options.write(results, "\n".join(["# Growth\n", report.describe_machine(results["machine"]), table]))


def workloads(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Workload]:
    """What is run, by budget and length."""
    base = WORKLOADS["w1"]
    return {
        f"{budget} {length}": replace(base, min_new_tokens=length, max_new_tokens=length, micro_batch_tokens=tokens)
        for budget, tokens in BUDGETS.items()
        for length in lengths
    }


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line through the logarithms: 1 where y is proportional to x."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(side) / len(points) for side in zip(*points, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a, _ in points)


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """By budget: tokens, seconds and MB of the runs that came to an end, shortest first."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if "failed" not in row:
            curve = found.setdefault(row["side"].split()[0], {"tokens": [], "step_s": [], "peak_mb": []})
            for name, values in curve.items():
                values.append(row[name])
    return found


def draw(rows: list[dict[str, Any]], vocabulary: int, path: Path) -> None:
    """Draw time and memory over tokens.

    Args:
        rows: summaries of the runs.
        vocabulary: for the memory that one fp32 tensor of all logits would take, drawn for comparison.
        path: of the picture.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    drawn = {budget: curve for budget, curve in curves(rows).items() if len(curve["tokens"]) > 1}
    for budget, curve in drawn.items():
        colour, marker, label = STYLE[budget]
        steepness = f"slope {slope(curve['tokens'], curve['step_s']):.2f}"
        line = {"color": colour, "marker": marker, "linewidth": 2}
        left.plot(curve["tokens"], curve["step_s"], label=f"{label}: {steepness}", **line)
        right.plot(curve["tokens"], curve["peak_mb"], label=label, **line)
    for curve in list(drawn.values())[-1:]:
        tokens, base = curve["tokens"], curve["peak_mb"][0]
        dense = [base + 4e-6 * vocabulary * (count - tokens[0]) for count in tokens]
        right.plot(tokens, dense, color="0.45", linestyle="--", label="plus one fp32 tensor [B, T, V]")
    for ax, title in ((left, "seconds a step"), (right, "peak resident memory (MB)")):
        ax.set_xscale("log", base=2)
        ax.set_xlabel("sampled tokens a step")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(title, fontsize=10.5)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=9)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    figure.savefig(path, dpi=200)
    plt.close(figure)
