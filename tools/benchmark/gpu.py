"""What an accelerator makes of a step: every case in a process of its own, and one page with all tables.

`card/` has the cases: `step` and `step_trl` (G1), `long` (G2), `head` (G3), `decode`, `checks`. Weights are random, in
published shapes, made on the device. With `--quick` the whole takes less than six minutes on one H100 or H200.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from tools.benchmark import report
from tools.benchmark.processes import run
from tools.benchmark.report import Options
from tools.benchmark.turns import has_trl

SKIPPED = 3  # first steps of a process: CUDA starts, kernels are compiled, graphs are captured
CASES = "tools.benchmark.card."
STEP_COLUMNS = {
    "step_s": ("s / step", ".3f"), "rollout_s": ("sampling", ".3f"), "teacher_s": ("teacher", ".3f"),
    "student_s": ("student, head, optimizer", ".3f"), "first_s": ("first step", ".1f"), "peak_gb": ("peak GB", ".1f"),
    "reverse_kl": ("reverse KL", ".4f"),
}  # fmt: skip
LONG_COLUMNS = {
    "teacher_s": ("teacher s", ".3f"), "student_s": ("student step s", ".3f"),
    "body_s": ("transformers' body s", ".3f"),
    "products_s": ("products of the heads s", ".3f"), "ratio": ("ours / both", ".2f"),
    "student_gib": ("ours GiB", ".1f"), "body_gib": ("body GiB", ".1f"),
}  # fmt: skip
HEAD_COLUMNS = {
    "seconds": ("s", ".4f"), "floor_s": ("products s", ".4f"), "ratio": ("s / products", ".2f"),
    "working_gib": ("GiB beside inputs", ".2f"),
}  # fmt: skip
DECODE_COLUMNS = {"ms": ("ms a token step", ".2f"), "limit_ms": ("limit", ".2f"), "rollout_s": ("rollout s", ".2f")}


def measure(options: Options) -> None:
    """Run all cases, and write what came of them."""
    job = {"tiny": options.tiny, "quick": options.quick, "paths": options.paths}
    steps = {"steps": SKIPPED + (2 if options.quick else options.steps)}
    results: dict[str, Any] = {"what": "gpu", "machine": report.machine(), "device": device_name(), "job": job}
    sides = {"lit_opd": "step"} | ({"TRL, autocast around its loss": "step_trl"} if has_trl() else {})
    results["g1"] = [
        {"side": side, "round": number, **summary(told(side, run(f"{CASES}{module}", job | steps)))}
        for number in range(1, (1 if options.quick else options.rounds) + 1)
        for side, module in sides.items()
    ]
    for name in ("decode", "head", "long", "checks"):
        results[name] = told(name, run(f"{CASES}{name}", job))
    options.write(results, to_text(results))


def told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What a process found, told in a line when it comes."""
    print(f"{name}: {found.get('failed', 'done')}", flush=True)
    return found


def device_name() -> str:
    """The accelerator in words."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    about = torch.cuda.get_device_properties(0)
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians over the steps that count."""
    if "failed" in found:
        return found
    steps = found["steps"][SKIPPED:] or found["steps"][-1:]
    names = [name for name in STEP_COLUMNS if name in steps[0]]
    medians = {name: statistics.median(step[name] for step in steps) for name in names}
    return medians | {"first_s": found["steps"][0]["step_s"], "peak_gb": found["peak_gb"], "paths": found.get("paths")}


def to_text(results: dict[str, Any]) -> str:
    """The Markdown of the results."""
    long = [row | ratio(row, "student_s", "body_s", "products_s") for row in rows_of(results["long"])]
    head = [row | ratio(row, "seconds", "floor_s") for row in rows_of(results["head"])]
    paths = next((row["paths"] for row in results["g1"] if row.get("paths")), None) or ["none was tried"]
    return "\n".join([
        "# On an accelerator\n",
        f"{results['device']}\n{report.describe_machine(results['machine'])}",
        "## G1: an optimizer step\n", report.table(results["g1"], ["side", "round"], STEP_COLUMNS),
        "Fast paths of ours:\n", *(f"- {path}" for path in paths),
        "\n## Decoding\n", report.table(rows_of(results["decode"]), ["model", "rows"], DECODE_COLUMNS),
        "## G2: long completions\n", report.table(long, ["model", "rows", "tokens", "checkpointed"], LONG_COLUMNS),
        "## G3: the head alone\n", report.table(head, ["widths", "side"], HEAD_COLUMNS),
        "## Correctness\n", *correctness(results["checks"]),
    ])  # fmt: skip


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a case, or the one that tells why there are none."""
    blank = dict.fromkeys(("model", "rows", "tokens", "checkpointed", "widths", "side"), "all")
    return found["rows"] if "rows" in found else [blank | found]


def ratio(row: dict[str, Any], over: str, *under: str) -> dict[str, float]:
    """What a row took over what the least takes, where both are known."""
    known = all(row.get(name) is not None for name in (over, *under))
    return {"ratio": row[over] / sum(row[name] for name in under)} if known else {}


def correctness(found: dict[str, Any]) -> list[str]:
    """A line for each comparison."""
    if "failed" in found:
        return [f"- failed: {found['failed']}\n"]
    off = ", ".join(f"{name} {distance:.1e}" for name, distance in found["fp32_off"].items())
    same = "the same bits" if found["repeated"] else "other bits"
    decoded = found["decoded"]
    return [
        f"- fp32 gradient, device against CPU, relative: {off}",
        f"- a gradient computed twice under deterministic algorithms: {same}",
        f"- tokens that fast and plain decoding write alike in bf16, up to the first other one of a row: "
        f"{decoded['alike']:.3f}; largest gap of their log-probabilities {decoded['largest_gap']:.1e} nats\n",
    ]
