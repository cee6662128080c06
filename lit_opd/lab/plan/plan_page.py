"""Print a plan as a table of phases and parts, and give it as JSON."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lit_opd.lab.plan.advice import MOST_PROMPTS, Advice
from lit_opd.lab.plan.phases import Plan

__all__ = ["as_json", "gigabytes", "print_plan"]


def gigabytes(number: float) -> str:
    """Write bytes in GB of 10^9, as data sheets and `perf/peak_memory_mb` count."""
    return f"{number / 1e9:.2f} GB"


def as_json(plan: Plan, advice: Advice) -> dict[str, Any]:
    """Give all numbers, bytes as whole numbers."""
    return {
        "device": {"name": plan.device.name, "bytes": round(plan.device.memory), "usable": round(plan.device.usable)},
        "phases": {name: {part: round(n) for part, n in parts.items() if n} for name, parts in plan.phases.items()},
        "peak": round(plan.peak),
        "fits": plan.fits,
        "largest": {"optim.micro_batch_tokens": advice.micro_batch_tokens, "data.batch_size": advice.batch_size},
        "changes": list(advice.changes),
        "token_step_s": plan.token_step_s,
        "assumed": list(plan.notes),
    }


def print_plan(plan: Plan, advice: Advice) -> None:
    """Print the bytes by part and phase, the peak, and the largest run that fits."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("GB", no_wrap=True)
    for name in plan.phases:
        table.add_column(name, justify="right", no_wrap=True)
    parts = list(dict.fromkeys(part for held in plan.phases.values() for part, number in held.items() if number))
    for part in parts:
        table.add_row(part, *(_cell(held.get(part, 0)) for held in plan.phases.values()))
    table.add_section()
    table.add_row("together", *(_cell(number) for number in plan.peaks.values()))
    width = Console(width=1000).measure(table).maximum
    Console(width=width).print(table)
    device, work = plan.device, plan.work
    print(f"\nmicro-batch: {work.rows} rows, {work.tokens} packed tokens; rollout: {plan.rows} rows")
    for note in plan.notes:
        print(f"assumed: {note}")
    if plan.token_step_s is not None:
        print(f"a decoded token reads weights and cache once: {1e3 * plan.token_step_s:.2f} ms at the least")
    print(f"{device.name}: {gigabytes(device.usable)} for tensors, of {gigabytes(device.memory)}")
    print(f"largest that fits: optim.micro_batch_tokens={_said(advice.micro_batch_tokens)}, "
          f"data.batch_size={_said(advice.batch_size)}, each with all else as it is")  # fmt: skip
    peak = max(plan.peaks, key=lambda name: plan.peaks[name])
    print(f"peak: {gigabytes(plan.peak)} ({peak}), which {'fits' if plan.fits else 'does not fit'}")


def _cell(number: float) -> str:
    return f"{number / 1e9:.2f}" if number else ""


def _said(number: int | None) -> str:
    return "none" if number is None else f"{number} or more" if number == MOST_PROMPTS else str(number)
