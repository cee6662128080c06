"""Make a whole comparison: its runs, what they left, the report.

`commands.experiments` calls this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_opd.errors import RunError, concealed
from lit_opd.files import only_one, write_file
from lit_opd.lab.compare.collect import RunResult, collect
from lit_opd.lab.compare.digest import make_report
from lit_opd.lab.compare.document import to_summary, write_report
from lit_opd.lab.compare.grid import Comparison, Run
from lit_opd.lab.compare.preflight import check_recorded, check_runs
from lit_opd.lab.compare.runs import begin_parent, make_runs
from lit_opd.runs.folder import check_writable
from lit_opd.tracking import MlflowClient, check_tracking, open_store

__all__ = ["compare", "compare_recorded"]


def compare(comparison: Comparison, runs: Sequence[Run], json_file: Path | None = None) -> None:
    """Make the runs that are not made yet, and report on all.

    The numbers of the report go to `json_file` too, where it is given.

    Raises:
        UserError: whatever cannot work; nothing has been written then.
        RunError: runs that failed; the others have been reported on.
        KeyboardInterrupt: Ctrl-C; the runs that were done have been reported on.
    """
    client = _client(comparison)
    check_runs(runs, comparison.may_differ)
    check_recorded(runs, client)
    check_writable("output_dir", Path(comparison.output_dir))
    with only_one("output_dir", Path(comparison.output_dir)) as lock:
        parent = begin_parent(comparison, client)
        status = "FAILED"
        try:
            interrupted = make_runs(comparison, runs, client, parent, lock)
            failed = _conclude(comparison, runs, client, parent, json_file)
            status = "KILLED" if interrupted else "FAILED" if failed else "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            client.set_terminated(parent, status)
            client.close()
    if interrupted:
        raise KeyboardInterrupt
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs: {', '.join(failed)}. The same command tries them again.")


def compare_recorded(comparison: Comparison, run_ids: Sequence[str], json_file: Path | None = None) -> None:
    """Report on runs that MLflow has, without making any or changing MLflow.

    Raises:
        UserError: no such runs, or runs that cannot be compared.
    """
    client = _client(comparison)
    _report(collect(client, run_ids), Path(comparison.output_dir) / "report", json_file)


def _client(comparison: Comparison) -> Any:
    check_tracking(comparison.tracking.uri)
    return open_store(comparison.tracking.uri, Path(comparison.output_dir))


def _conclude(
    comparison: Comparison, runs: Sequence[Run], client: MlflowClient, parent: str, json_file: Path | None
) -> list[str]:
    """Report on the runs of the comparison as it is now, and return the names of those that did not finish."""
    found = {(result.variant, result.seed): result for result in collect(client, [parent])}
    results = [found[run.variant, run.seed] for run in runs if (run.variant, run.seed) in found]
    finished = {(result.variant, result.seed) for result in results if result.status == "FINISHED"}
    if finished:
        folder = Path(comparison.output_dir) / "report"
        _report(results, folder, json_file)
        client.log_artifacts(parent, str(folder), "report")
        where = f"experiment {comparison.tracking.experiment!r} in {concealed(comparison.tracking.uri)}"
        print(f"MLflow: run {parent} of {where}")
    return [run.name for run in runs if (run.variant, run.seed) not in finished]


def _report(results: list[RunResult], folder: Path, json_file: Path | None) -> None:
    report = make_report(results)
    write_report(report, folder)
    if json_file is not None:
        write_file(json_file, (folder / "report.json").read_bytes())
    print(to_summary(report))
    print(f"report: {folder / 'report.html'}")
