"""Make the numbers and figures of RESULTS.md from the reports of comparisons; its prose is left as it is.

Usage: ``python -m tools.make_results NAME=FOLDER [NAME=FOLDER ...] [--uri sqlite:///mlflow.db]``, e.g.
``tiny=outputs/results_tiny/report``, on the machine that made the runs and with the cores that they had.

Writes ``docs/results_NAME.json``, the numbers that are shown, and ``docs/results_NAME_*.png``; then fills every block
``<!-- results NAME: KIND ... -->`` to ``<!-- end -->`` of RESULTS.md from all stored numbers, those of earlier
comparisons too. Without names it only fills. With ``--uri`` the tracking database of the runs adds their commit, the
time that they took, and values of single training steps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from lit_opd.lab.compare.collect import Point
from lit_opd.lab.compare.curves import draw_curves
from lit_opd.lab.compare.digest import Curve
from tools.benchmark.report import machine
from tools.results.blocks import DRAWN, block
from tools.results.store import Stored, read_record, trim, write

REQUIRED = ("ranking", "ties", "compute")
OPENING = re.compile(r"<!-- results (?P<name>\w+): (?P<what>[^>]+?) -->")
BLOCK = re.compile(OPENING.pattern + r"\n(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", metavar="NAME=FOLDER", help="a name in RESULTS.md and its report folder")
    parser.add_argument("--uri", help="MLflow tracking URI of the runs")
    parser.add_argument("--page", type=Path, default=Path("RESULTS.md"), help="the page to fill")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of numbers and figures")
    arguments = parser.parse_args()
    reports = dict(_named(text) for text in arguments.reports)
    page = arguments.page.read_text(encoding="utf-8")
    check_markers(page, reports)
    for name, folder in reports.items():
        take(name, folder, arguments.docs, arguments.uri)
    filled = fill(page, stored_numbers(arguments.docs))
    arguments.page.write_text(filled, encoding="utf-8")
    print(f"{arguments.page}: {'filled' if filled != page else 'nothing to change'}")


def take(name: str, folder: Path, docs: Path, uri: str | None) -> Stored:
    """Store the numbers and the figures of a comparison.

    Args:
        name: in RESULTS.md.
        folder: that `compare` wrote, with its `report.json`.
        docs: where they go.
        uri: MLflow tracking URI of the runs; None does without what only MLflow has.

    Raises:
        SystemExit: no report there, or nothing was finished.
    """
    source = folder / "report.json"
    if not source.is_file():
        raise SystemExit(f"{name}={folder}: no report.json there; expected OUTPUT_DIR/report of a comparison.")
    report = json.loads(source.read_text(encoding="utf-8"))
    if not report["rankings"]:
        raise SystemExit(f"{source}: no run of it has finished.")
    record = {} if uri is None else read_record(MlflowClient(uri), parent_of(folder))
    stored = trim(name, report, record, this_machine())
    write(stored, docs / f"results_{name}.json")
    curves = [Curve(**curve | {"points": [Point(**point) for point in curve["points"]]}) for curve in report["curves"]]
    for yardstick in DRAWN:
        if drawn := draw_curves(curves, report["variants"], yardstick):
            (docs / f"results_{name}_curves_{yardstick}.png").write_bytes(drawn)
    return stored


def parent_of(folder: Path) -> str:
    """The MLflow run of the comparison whose report lies in a folder."""
    state = folder.parent / "comparison.json"
    if not state.is_file():
        raise SystemExit(f"{state}: not found; --uri needs the output folder of the comparison as it was left.")
    return json.loads(state.read_text(encoding="utf-8"))["mlflow_run_id"]


def this_machine() -> dict[str, Any]:
    """What the numbers depend on, without the commit, which may be another than that of the runs."""
    found = machine()
    versions = {name: version for name, version in found["versions"].items() if name != "trl"}
    kept = {name: value for name, value in found.items() if name != "commit"}
    return kept | {"cores_of_all": os.cpu_count(), "versions": versions}


def stored_numbers(docs: Path) -> dict[str, Stored]:
    """Name -> numbers of every comparison that was ever taken."""
    files = sorted(docs.glob("results_*.json"))
    return {file.stem.removeprefix("results_"): json.loads(file.read_text(encoding="utf-8")) for file in files}


def check_markers(page: str, names: Mapping[str, object]) -> None:
    """Refuse a page whose blocks are not closed, or that does not show a comparison.

    Raises:
        SystemExit: with the marker that is missing.
    """
    closed = {match.start() for match in BLOCK.finditer(page) if not OPENING.search(match["body"])}
    for opening in OPENING.finditer(page):
        if opening.start() not in closed:
            raise SystemExit(f"RESULTS.md: no `<!-- end -->` on a line below `{opening[0]}`.")
    for name in names:
        shown = {match["what"].partition(" ")[0] for match in OPENING.finditer(page) if match["name"] == name}
        for kind in REQUIRED:
            if kind not in shown:
                expected = f"`<!-- results {name}: {kind}{' accuracy' * (kind != 'compute')} -->` and `<!-- end -->`"
                raise SystemExit(f"RESULTS.md: no block {kind!r} of {name!r}; put {expected} where it belongs.")


def fill(page: str, stored: Mapping[str, Stored]) -> str:
    """The page with its blocks made from the numbers; blocks of comparisons that are not stored stay as they are.

    Raises:
        SystemExit: a marker that is missing, or that cannot be filled.
    """
    check_markers(page, stored)

    def filled(match: re.Match[str]) -> str:
        if match["name"] not in stored:
            return match[0]
        opening = match[0].partition("\n")[0]
        try:
            return f"{opening}\n\n{block(match['what'], stored[match['name']])}\n\n{match['end']}"
        except LookupError as error:
            raise SystemExit(f"RESULTS.md: `{opening}`: {error.args[0]}.") from error

    return BLOCK.sub(filled, page)


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name) or not folder:
        raise SystemExit(f"{text!r}: expected NAME=FOLDER, e.g. tiny=outputs/results_tiny/report.")
    return name, Path(folder)


if __name__ == "__main__":
    main()
