"""W1 and W2: ours and TRL's in turn, and the limit of the machine before and after."""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

from transformers import AutoTokenizer

from tools.benchmark import report, roofline
from tools.benchmark.processes import run
from tools.benchmark.report import Options
from tools.benchmark.workloads import STUDENT, TEACHER, WORKLOADS, make_job, prepare_models

OURS, FIXED, SHIPPED, SETTLED = "lit_opd", "TRL fixed", "TRL as shipped", "TRL fixed, our allocator settings"
NO_TRL = "TRL is not installed (pip install trl==1.16.0): ours runs alone"
RATE_TRIES = 7
# What is compared pair by pair: title, which side is over which, and the number. Where completions end by themselves,
# a step is not the same work on both sides, but a completion is, on average, and a token.
MEMORY = ("peak RSS", "{ours} / {side}", "peak_mb")
COMPARED = {
    "w1": (("time", "{side} / {ours}", "step_s"), MEMORY),
    "w2": (
        ("completions a second", "{ours} / {side}", "completions_per_s"),
        ("tokens a second", "{ours} / {side}", "tokens_per_s"),
        MEMORY,
    ),
}


def has_trl() -> bool:
    """Whether its side can run; says so where it cannot."""
    found = importlib.util.find_spec("trl") is not None
    if not found:
        print(NO_TRL)
    return found


def schedule(rounds: int, with_trl: bool) -> list[tuple[str, int]]:
    """Sides and rounds in the order of their runs: A B A B, and in the end TRL as shipped, and as ours is started."""
    if not with_trl:
        return [(OURS, number) for number in range(1, rounds + 1)]
    return [(side, number) for number in range(1, rounds + 1) for side in (OURS, FIXED)] + [(SHIPPED, 1), (SETTLED, 1)]


def measure(options: Options) -> None:
    """Run W1 or W2, and write what came of it."""
    prepare_models()
    workload = WORKLOADS[options.what]
    job = make_job(workload, options.steps)
    prompt = prompt_tokens(job["batches"][report.WARM_UP :])
    step = roofline.Step(workload.rows, workload.completions, prompt, workload.max_new_tokens)
    student, teacher = (roofline.read_geometry(folder) for folder in (STUDENT, TEACHER))
    rate_job = {"shapes": roofline.shapes(student, step), "tries": RATE_TRIES}
    before = run("tools.benchmark.rates", rate_job)
    runs = [run_side(side, number, job) for side, number in schedule(options.rounds, has_trl())]
    rates = best_rates([before, run("tools.benchmark.rates", rate_job)])
    rows = [report.summarise(found) for found in runs]
    if rates is not None:
        rows = [add_limit(row, roofline.Limit(student, teacher, rates), step) for row in rows]
    results = {
        "what": options.what, "machine": report.machine(), "rates": rates, "rows": rows, "runs": runs,
        "least_mb": roofline.least_mb(student, teacher),
    }  # fmt: skip
    options.write(results, to_text(results))


def prompt_tokens(batches: list[list[str]]) -> float:
    """The mean length of prompts in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    chats = [[{"role": "user", "content": question}] for batch in batches for question in batch]
    encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return statistics.fmean(map(len, encoded))


def run_side(side: str, number: int, job: dict[str, Any]) -> dict[str, Any]:
    """One run, told in a line when it ends."""
    module = "ours" if side == OURS else "trl"
    found = run(f"tools.benchmark.{module}", job | {"fixed": side in (FIXED, SETTLED)}, side in (OURS, SETTLED))
    print(f"round {number}, {side}: {found.get('failed') or describe_run(found)}", flush=True)
    return {"side": side, "round": number, **found}


def describe_run(found: dict[str, Any]) -> str:
    """Its steps and memory in a line."""
    seconds = ", ".join(f"{step['step_s']:.2f}" for step in found["steps"])
    return f"{seconds} s; {found['peak_mb']:.0f} MB"


def best_rates(measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The highest of each rate, as the limit of a machine is what it can do; None where none was measured."""
    known = [rates for rates in measured if "failed" not in rates]
    if not known:
        return None
    products = {name: {s: max(r[name][s] for r in known) for s in known[0][name]} for name in ("bf16", "fp32")}
    return products | {name: max(rates[name] for rates in known) for name in ("read", "copy", "threads")}


def add_limit(row: dict[str, Any], limit: roofline.Limit, longest: roofline.Step) -> dict[str, Any]:
    """The row with the limit of a step that samples as many tokens as its own did."""
    if "failed" in row:
        return row
    seconds = limit.seconds(longest._replace(new=row["length"]))
    return row | {"limit": seconds, "over_limit": row["step_s"] / seconds["step_s"]}


def to_text(results: dict[str, Any]) -> str:
    """The Markdown of the results."""
    rows = results["rows"]
    parts = [
        f"# {results['what'].upper()}\n",
        report.describe_machine(results["machine"]),
        "Medians over the steps of a run, then over runs. Seconds of a step, and where they go:\n",
        report.table(report.by_side(rows), ["side", "runs"], report.COLUMNS),
        *(compare(results, side) for side in (FIXED, SHIPPED, SETTLED) if any(row["side"] == side for row in rows)),
    ]
    if results["rates"] is not None:
        parts.append(describe_limit(results))
    return "\n".join([*parts, "All runs:\n", report.table(rows, ["side", "round"], report.COLUMNS)])


def compare(results: dict[str, Any], side: str) -> str:
    """Ours and another side, pair by pair."""
    lines = []
    for title, form, name in COMPARED[results["what"]]:
        told = form.format(ours=OURS, side=side)
        ratios = report.pair_ratios(results["rows"], *told.split(" / "), name)
        lines.append(f"- {title}, {told}: {report.describe_ratios(ratios)}\n")
    return "".join(lines)


def describe_limit(results: dict[str, Any]) -> str:
    """The limit of our first run, and the rates it is made of."""
    rates, lines = results["rates"], []
    for limit in [row["limit"] for row in results["rows"] if "limit" in row][:1]:
        split = ", ".join(f"{name[:-2]} {seconds:.2f}" for name, seconds in limit.items() if name != "step_s")
        lines.append(f"Limit: {limit['step_s']:.2f} s ({split}); least memory {results['least_mb']:.0f} MB.\n\n")
    for name in ("bf16", "fp32"):
        told = ", ".join(f"{shape} {rate / 1e9:.0f}" for shape, rate in rates[name].items())
        lines.append(f"- {name}, GFLOP/s: {told}\n")
    lines.append(f"- memory, GB/s: read {rates['read'] / 1e9:.1f}, copy {rates['copy'] / 1e9:.1f}\n")
    return "".join(lines)
