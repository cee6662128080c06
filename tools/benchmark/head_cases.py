"""W3: every size, by every way of computing the head, each case in a process of its own."""

from __future__ import annotations

from typing import Any

from tools.benchmark import report
from tools.benchmark.processes import run
from tools.benchmark.report import Options
from tools.benchmark.turns import has_trl

SIZES = [(positions, vocabulary) for vocabulary in (32768, 49152, 151936) for positions in (512, 2048, 8192)]
QUICK_SIZES = [(128, 4096)]
WIDTHS = {"width": 576, "teacher_width": 960}
LIMIT_GIB = 20
WHAT = """N is the number of positions, V the size of the vocabulary. Only the head is timed: hidden states of student
and teacher go in, the loss and its gradients come out; no body of a model runs.
"""
DENSE_COPIES = 5  # fp32 tensors [N, V] that live at once at the peak of the dense backward: 4.5 were measured


def measure(options: Options) -> None:
    """Run all cases, and write what came of them."""
    names = ["ours", "dense", "trl"] if has_trl() else ["ours", "dense"]
    rows = []
    for number in range(1, options.rounds + 1):
        for positions, vocabulary in QUICK_SIZES if options.quick else SIZES:
            for name in names:
                case = {"implementation": name, "positions": positions, "vocabulary": vocabulary}
                found = run_case(case | WIDTHS | {"runs": options.steps})
                print(f"round {number}, V={vocabulary} N={positions} {name}: {describe(found)}", flush=True)
                rows.append({"side": name, "round": number, "V": vocabulary, "N": positions, **found})
    results = {"what": "w3", "machine": report.machine(), "rows": rows}
    options.write(results, to_text(results))


def dense_gib(positions: int, vocabulary: int) -> float:
    """What the dense computation takes at its peak, GiB."""
    return DENSE_COPIES * 4 * positions * vocabulary / 2**30


def run_case(job: dict[str, Any]) -> dict[str, Any]:
    """One case, unless it is known beforehand not to fit."""
    needed = dense_gib(job["positions"], job["vocabulary"]) if job["implementation"] == "dense" else 0.0
    if needed > LIMIT_GIB:
        return {"failed": f"not run: it would take about {needed:.0f} GiB, more than {LIMIT_GIB}"}
    return run("tools.benchmark.head", job)


def describe(found: dict[str, Any]) -> str:
    """A case in a line."""
    return found.get("failed") or f"{found['seconds']:.3f} s, {found['working_mib']:.0f} MiB, loss {found['loss']:.5f}"


def to_text(results: dict[str, Any]) -> str:
    """The Markdown of the results."""
    rows, lines = results["rows"], []
    for size in dict.fromkeys((row["V"], row["N"]) for row in rows):
        case = [row for row in rows if (row["V"], row["N"]) == size]
        for side in dict.fromkeys(row["side"] for row in case if row["side"] != "ours"):
            ratios = report.describe_ratios(report.pair_ratios(case, side, "ours", "seconds"))
            lines.append(f"- V={size[0]}, N={size[1]}: time, {side} / ours: {ratios}\n")
    head = [f"# {results['what'].upper()}\n", WHAT, report.describe_machine(results["machine"])]
    table = report.table(rows, ["V", "N", "side", "round"], report.HEAD_COLUMNS)
    return "\n".join([*head, table, "".join(lines)])
