"""Run an experiment of `lab/` and print its report.

The command line calls it for `measure`, `compare` and `audit`. Numbers go to `json_file` too, where one is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lit_opd.commands.json_file import destination
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.files import write_file
from lit_opd.lab import audit as audits
from lit_opd.lab import measure as measurements
from lit_opd.lab.compare import command as comparisons
from lit_opd.lab.compare.grid import Comparison, Run
from lit_opd.tracking import check_tracking

__all__ = ["audit", "compare", "compare_recorded", "compare_table", "measure", "plan_comparison"]


def measure(config: Config, json_file: str | None) -> None:
    """Compare the gradients of several estimators on the same rollouts, those made before a Ctrl-C."""
    quiet_libraries()
    file = destination(json_file)
    check_tracking(config.tracking.uri)
    measurement = measurements.measure(config)
    measurements.print_measurement(measurement)
    if file is not None:
        write_file(file, json.dumps(measurement.as_json(), indent=2, allow_nan=False))
    print(f"MLflow: {measurements.record(config, measurement)}")
    if measurement.interrupted:
        raise KeyboardInterrupt


def compare(comparison: Comparison, runs: Sequence[Run], json_file: str | None) -> None:
    """Make the runs of a comparison and say which variant is better."""
    quiet_libraries()
    comparisons.compare(comparison, runs, destination(json_file))


def compare_recorded(comparison: Comparison, run_ids: Sequence[str], json_file: str | None) -> None:
    """Say which variant is better, of runs that MLflow has."""
    quiet_libraries()
    comparisons.compare_recorded(comparison, run_ids, destination(json_file))


def compare_table(
    comparison: Comparison, file: str, better: str | None, scale: str | None, json_file: str | None
) -> None:
    """Say which variant is better, of results that were made elsewhere."""
    comparisons.compare_table(comparison, Path(file), better, scale, destination(json_file))


def plan_comparison(comparison: Comparison) -> None:
    """Say what a comparison can tell with its seeds, without making a run."""
    comparisons.plan(comparison)


def audit(config: Config, json_file: str | None) -> None:
    """Look for mistakes that would spoil a long run, before it starts."""
    quiet_libraries()
    file = destination(json_file)
    found = audits.audit(config)
    audits.print_audit(found)
    if file is not None:
        audits.write_json(found, file)
    found.enforce()
