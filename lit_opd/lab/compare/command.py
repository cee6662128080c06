"""Make a whole comparison: its runs, what they left, the report.

`commands.experiments` calls this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_opd.errors import RunError, concealed
from lit_opd.files import finite, only_one, write_file
from lit_opd.lab.compare.collect import collect
from lit_opd.lab.compare.digest import Report, analysis_to_json, make_report
from lit_opd.lab.compare.document import overview, sentence, to_summary, to_text, write_report
from lit_opd.lab.compare.from_table import analyse_table
from lit_opd.lab.compare.grid import Comparison, Run
from lit_opd.lab.compare.power import smallest_difference
from lit_opd.lab.compare.preflight import check_recorded, check_runs
from lit_opd.lab.compare.runs import begin_parent, make_runs
from lit_opd.runs.folder import check_writable
from lit_opd.tracking import MlflowClient, check_tracking, open_store, view_link

__all__ = ["compare", "compare_recorded", "compare_table", "plan"]

NOTE = "mlflow.note.content"  # what MLflow shows as the description of a run
LOCAL = "http://127.0.0.1:5000"  # where `ui` serves by default
SEEDS_SHOWN = (2, 3, 4, 5, 8, 10)


def compare(comparison: Comparison, runs: Sequence[Run], json_file: Path | None = None) -> None:
    """Make the runs that are not made yet, and report on all, with numbers in `json_file` where it is given.

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
    """Report on runs that MLflow has, without making any or changing MLflow."""
    runs = collect(_client(comparison), run_ids)
    _report(make_report(runs, comparison.contrasts), Path(comparison.output_dir) / "report", json_file)


def compare_table(
    comparison: Comparison, file: Path, better: str | None, scale: str | None, json_file: Path | None
) -> None:
    """Report on results that were made elsewhere, a table of metric, variant, seed, prompt and value."""
    found = analyse_table(file, better, scale, comparison.contrasts)
    if json_file is not None:
        metrics = {name: analysis_to_json(analysis) for name, analysis in found.items()}
        write_file(json_file, json.dumps(finite({"metrics": metrics}), indent=1, allow_nan=False) + "\n")
    print("\n\n".join(f"{name}: {sentence(analysis)}\n{to_text(analysis)}" for name, analysis in found.items()))


def plan(comparison: Comparison) -> None:
    """Say what the comparison can tell with the seeds that it asks for, and with others, without making a run."""
    variants, seeds = len(comparison.variants), len(comparison.seeds)
    print(f"{variants} variants x {seeds} seeds: {variants * seeds} runs")
    if variants < 2:
        print("One variant: nothing is compared.")
        return
    print("A difference from the best is found, in standard deviations between seeds, by")
    print(f"{'seeds':>8} {'half':>8} {'nine in ten':>12} of all comparisons")
    for sight in (smallest_difference(variants, number) for number in sorted({*SEEDS_SHOWN, seeds})):
        here = "  <- these" * (sight.seeds == seeds)
        found = ("nothing", "nothing") if math.isinf(sight.half) else (f"{sight.half:.2f}", f"{sight.nine_in_ten:.2f}")
        print(f"{sight.seeds:>8} {found[0]:>8} {found[1]:>12}{here}")
    print("Runs of one seed share prompts and random numbers: what a seed does to all variants is no error.")


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
        report = make_report(results, comparison.contrasts)
        _report(report, folder, json_file)
        client.set_tag(parent, NOTE, overview(report))
        client.log_artifacts(parent, str(folder), "report")
        _say_where(comparison.tracking.uri, parent, client.get_run(parent).info.experiment_id)
    return [run.name for run in runs if (run.variant, run.seed) not in finished]


def _say_where(uri: str, parent: str, experiment: str) -> None:
    """Name the comparison in MLflow, and the link that opens its runs as a table by variant."""
    served = uri.startswith("http")
    print(f"MLflow: run {parent}, its runs at {view_link(concealed(uri) if served else LOCAL, experiment)}")
    if not served:
        print(f"        while this serves them: python -m lit_opd ui tracking.uri={concealed(uri)}")


def _report(report: Report, folder: Path, json_file: Path | None) -> None:
    write_report(report, folder)
    if json_file is not None:
        write_file(json_file, (folder / "report.json").read_bytes())
    print(to_summary(report.metrics) or "No run has finished: there is nothing to compare yet.")
    for run in report.left_out:
        print(f"left out: {run.variant} with seed {run.seed}, {run.why}")
    print(f"report: {folder / 'report.html'}")
