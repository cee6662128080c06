"""Run an experiment of `lab/` and print its report.

The command line calls it for `measure`, `compare` and `audit`. Numbers go to `json_file` too, where one is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.errors import UserError
from lit_opd.files import write_file
from lit_opd.lab import audit as audits
from lit_opd.lab import measure as measurements
from lit_opd.lab.compare import command as comparisons
from lit_opd.lab.compare.grid import Comparison, Run
from lit_opd.runs.folder import check_writable
from lit_opd.tracking import check_tracking

__all__ = ["audit", "compare", "compare_recorded", "measure"]


def measure(config: Config, json_file: str | None) -> None:
    """Compare the gradients of several estimators on the same rollouts.

    Raises:
        KeyboardInterrupt: Ctrl-C; the rollouts measured so far have been reported.
    """
    quiet_libraries()
    path = _path(json_file)
    check_tracking(config.tracking.uri)
    measurement = measurements.measure(config)
    measurements.print_measurement(measurement)
    if path:
        write_file(path, json.dumps(measurement.as_json(), indent=2, allow_nan=False))
    print(f"MLflow: {measurements.record(config, measurement)}")
    if measurement.interrupted:
        raise KeyboardInterrupt


def compare(comparison: Comparison, runs: Sequence[Run], json_file: str | None) -> None:
    """Make the runs of a comparison and say which variant is better."""
    quiet_libraries()
    comparisons.compare(comparison, runs, _path(json_file))


def compare_recorded(comparison: Comparison, run_ids: Sequence[str], json_file: str | None) -> None:
    """Say which variant is better, of runs that MLflow has."""
    quiet_libraries()
    comparisons.compare_recorded(comparison, run_ids, _path(json_file))


def audit(config: Config, json_file: str | None) -> None:
    """Look for mistakes that would spoil a long run, before it starts."""
    quiet_libraries()
    path = _path(json_file)
    found = audits.audit(config)
    audits.print_audit(found)
    if path:
        audits.write_json(found, path)
    found.enforce()


def _path(name: str | None) -> Path | None:
    """Check that a file could be written, before minutes of work."""
    if name:
        check_writable("--json", Path(name).parent)
        if Path(name).is_dir():
            raise UserError("--json", "a file", f"{name!r}, a folder", "Name a file in it.")
    return Path(name) if name else None
