"""Train a student, or measure one, and print the table.

The command line calls it for `fit`, `validate` and `test`. In Python, `runs.train` and `runs.evaluate` do the work.
"""

from __future__ import annotations

from lit_opd import runs
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.commands.summary import print_outcome, print_results
from lit_opd.config import Config

__all__ = ["evaluate", "fit"]


def fit(config: Config, resume: str | None, profile: bool) -> None:
    """Distil the student as `runs.train` does, and print the table before / after / teacher."""
    quiet_libraries()
    print_outcome(config, runs.train(config, resume, profile))


def evaluate(config: Config, checkpoint: str | None, stage: str) -> None:
    """Measure the configured student, or a checkpoint of it, as `runs.evaluate` does, and print the table."""
    quiet_libraries()
    results = runs.evaluate(config, checkpoint, stage)
    print_results(f"{stage}: {checkpoint or config.student.path}", results)
