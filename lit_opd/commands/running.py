"""Train a student, or measure one, and print the results as a table for the terminal.

The command line calls it for `fit`, `validate` and `test`. In Python, `runs.train` and `runs.evaluate` do the work.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table

from lit_opd import runs
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.measures.intervals import Interval
from lit_opd.measures.table import describe, in_order
from lit_opd.runs import Outcome, Results
from lit_opd.tracking import ui_command

__all__ = ["evaluate", "fit", "perf_line", "print_outcome"]


def fit(config: Config, resume: str | None, profile: bool) -> None:
    """Distil the student as `runs.train` does, and print the table before / after / teacher."""
    quiet_libraries()
    print_outcome(config, runs.train(config, resume, profile))


def evaluate(config: Config, checkpoint: str | None, stage: str) -> None:
    """Measure the configured student, or a checkpoint of it, as `runs.evaluate` does, and print the table."""
    quiet_libraries()
    results = runs.evaluate(config, checkpoint, stage)
    _print(f"{stage}: {checkpoint or config.student.path}", {"student": results})


@rank_zero_only
def print_outcome(config: Config, outcome: Outcome) -> None:
    """Print the table before / after / teacher, and where checkpoint, exported model and MLflow run are."""
    columns = {"before": outcome.before, f"after {outcome.steps} steps": outcome.after, "teacher": outcome.teacher}
    _print("Held-out prompts at temperature 1, with 95% intervals", columns)
    if outcome.perf:
        print(perf_line(outcome.perf))
    print(f"checkpoint: {outcome.checkpoint}")
    print(f"exported model: {outcome.student}")
    print(f"MLflow: {ui_command(config, outcome.logger)}")


def perf_line(perf: Mapping[str, float]) -> str:
    """Say in one line what a step cost, from medians of `perf/*`."""
    value = {name.removeprefix("perf/"): number for name, number in perf.items()}
    shares = ", ".join(
        f"{name} {value[f'{name}_s'] / value['step_s']:.0%}" for name in ("rollout", "teacher", "student")
    )
    speed = f"{value['tokens_per_s']:.0f} completion tokens/s; peak memory {value['peak_memory_mb']:.0f} MB"
    return f"median step: {value['step_s']:.3f} s ({shares}), {speed}"


@rank_zero_only
def _print(title: str, columns: dict[str, Results]) -> None:
    table = _table(columns)
    # At its own width: a narrow terminal wraps it, a file keeps it whole, and no number is cut.
    width = Console(width=1000).measure(table).maximum
    print(f"{title}\n")
    Console(width=width).print(table)
    print("\nKL, JSD, NLL and entropy in nats per token, length in tokens")


def _table(columns: dict[str, Results]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name in in_order(name for results in columns.values() for name in results):
        table.add_row(describe(name).label, *(_cell(results.get(name)) for results in columns.values()))
    return table


def _cell(interval: Interval | None) -> str:
    return "" if interval is None else "{} \\[{}, {}]".format(*map(_number, interval))


def _number(value: float) -> str:
    # No "-0.000": a KL of rounding error has no sign.
    return f"{0.0 if abs(value) < 5e-4 else value:.3f}" if abs(value) < 10 else f"{value:.1f}"
