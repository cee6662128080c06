"""Train a student, or measure one, and print the results as a table for the terminal.

The command line calls it for `fit`, `validate` and `test`. In Python, `runs.train` and `runs.evaluate` do the work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table

from lit_opd import runs
from lit_opd.commands.banner import announce, banner, findings
from lit_opd.commands.json_file import destination
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.errors import UserError
from lit_opd.files import write_file
from lit_opd.lab.plan import find_device, make_plan
from lit_opd.lab.plan.plan_page import gigabytes
from lit_opd.measures.intervals import Interval
from lit_opd.measures.table import describe, in_order
from lit_opd.runs import Outcome, Results
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.rehearsal import rehearse
from lit_opd.tracking import ui_command

__all__ = ["evaluate", "fit", "perf_line", "print_outcome"]


def fit(config: Config, resume: str | None, profile: bool, dry_run: bool) -> None:
    """Distil the student as `runs.train` does, and print the table before / after / teacher."""
    quiet_libraries()
    if dry_run:
        _rehearse(config, resume)
        return
    print_outcome(config, runs.train(config, resume, profile, announce))


def _rehearse(config: Config, resume: str | None) -> None:
    found = rehearse(config, resume)
    if isinstance(found, Outcome):
        print(f"The run in {config.output_dir} has ended after {found.steps} steps. Nothing is left to do.")
        return
    print(banner(config, found.made))
    print(findings(config, found))
    made = make_plan(config, find_device(None))
    print(f"memory     {gigabytes(made.peak)} at the peak, of {gigabytes(made.device.usable)} on {made.device.name}")
    print("Everything but the first step was done, and nothing was written. Train: the same without --dry-run.")


def evaluate(config: Config, checkpoint: str | None, untrained: bool, json_file: str | None, stage: str) -> None:
    """Measure a student as `runs.evaluate` does, and print the table.

    It is that of a checkpoint, by default the newest of the run in `output_dir`, or the `untrained` one.
    """
    quiet_libraries()
    file = destination(json_file)
    if untrained and checkpoint is not None:
        raise UserError("--untrained", "no --checkpoint beside it", repr(checkpoint), "Drop one of them.")
    chosen = (
        None
        if untrained
        else str(RunFolder(Path(config.output_dir)).find_checkpoint(checkpoint, "--checkpoint or --untrained"))
    )
    results = runs.evaluate(config, chosen, stage)
    _print(f"{stage}: {chosen or config.student.path}", {"student": results})
    if file is not None:
        _write_json(
            file,
            {
                "stage": stage,
                "checkpoint": chosen,
                "metrics": {name: {"variants": {"student": interval._asdict()}} for name, interval in results.items()},
            },
        )


@rank_zero_only
def _write_json(file: Path, values: dict[str, Any]) -> None:
    write_file(file, json.dumps(values, indent=2))


@rank_zero_only
def print_outcome(config: Config, outcome: Outcome) -> None:
    """Print the table before / after / teacher, and where checkpoint, exported model and MLflow run are."""
    made = outcome.exported_step or outcome.steps
    columns = {"before": outcome.before, f"after {made} steps": outcome.after, "teacher": outcome.teacher}
    _print("Held-out prompts at temperature 1, with 95% intervals", columns)
    if outcome.exported_step is not None:
        best = f"the best by {config.checkpoint.keep_best}, of step {made}"
        print(f"stopped for collapse at step {outcome.steps}: measured and exported is {best}")
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
