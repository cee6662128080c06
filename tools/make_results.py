"""Make the numbers and figures of the pages of results from the reports of comparisons; their prose is left as it is.

Usage: ``python -m tools.make_results NAME=FOLDER [NAME=FOLDER ...] [--uri sqlite:///mlflow.db]``, e.g.
``tiny=outputs/results_tiny/report``.

Writes ``docs/results_NAME.json``, the numbers that are shown, and of several seeds ``docs/results_NAME_*.png``; then
fills every block ``<!-- results NAME: KIND ... -->`` to ``<!-- end -->`` of RESULTS.md and docs/results.md from all
stored numbers, those of earlier comparisons too. Without names it only fills. With ``--uri`` the tracking database of
the runs adds the time that they took, and values of single training steps. Run it where the comparison was run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from lit_opd.lab.compare.curves import draw_curves
from lit_opd.lab.compare.dots import draw_seeds
from tools.results.blocks import DRAWN, SEEDS, block, file_of
from tools.results.store import Results, Stored, read, read_curves, read_record, trim, write

REQUIRED = ("overview", "ranking", "compute")
REQUIRED_OF_RATES = ("rates", "compute")  # a comparison of one seed chooses and tests nothing
OPENING = re.compile(r"<!-- results (?P<name>\w+): (?P<what>[^>]+?) -->")
BLOCK = re.compile(OPENING.pattern + r"\n(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", metavar="NAME=FOLDER", help="a name on the pages and its report folder")
    parser.add_argument("--uri", help="MLflow tracking URI of the runs")
    parser.add_argument("--pages", type=Path, nargs="+", default=[Path("RESULTS.md"), Path("docs/results.md")],
                        help="the pages to fill")  # fmt: skip
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of numbers and figures")
    arguments = parser.parse_args()
    reports = dict(_named(text) for text in arguments.reports)
    texts = {page: page.read_text(encoding="utf-8") for page in arguments.pages}
    check_markers(texts, reports)
    for name, folder in reports.items():
        take(name, folder, arguments.docs, arguments.uri)
    stored = stored_numbers(arguments.docs)
    check_markers(texts, stored)
    for page, text in texts.items():
        filled = fill(page, text, stored, arguments.docs)
        page.write_text(filled, encoding="utf-8")
        print(f"{page}: {'filled' if filled != text else 'nothing to change'}")


def take(name: str, folder: Path, docs: Path, uri: str | None) -> Stored:
    """Store the numbers and the figures of a comparison.

    Args:
        name: on the pages.
        folder: that `compare` wrote, with its `report.json`.
        docs: where they go.
        uri: MLflow tracking URI of the runs; None does without what only MLflow has.

    Raises:
        SystemExit: no report there, nothing was finished, or several seeds without the contrasts that the pages show.
    """
    source = folder / "report.json"
    if not source.is_file():
        raise SystemExit(f"{name}={folder}: no report.json there; expected OUTPUT_DIR/report of a comparison.")
    text = source.read_text(encoding="utf-8")
    report = json.loads(text.replace(f"{json.dumps(os.getcwd())[1:-1]}{os.sep}", ""))  # models of this checkout
    if not report["metrics"]:
        raise SystemExit(f"{source}: no run of it has finished.")
    if report["contrasts"] != "all" and len(report["seeds"]) > 1:
        raise SystemExit(f"{source}: made with contrasts={report['contrasts']}; the pages show pairs: contrasts=all.")
    record = {} if uri is None else read_record(MlflowClient(uri), parent_of(folder))
    stored = trim(name, report, record)
    write(stored, docs / f"results_{name}.json")
    if len(report["seeds"]) > 1:
        draw(name, report, docs)
    return stored


def draw(name: str, report: Mapping[str, Any], docs: Path) -> None:
    """Write the figures of a comparison: where every seed ended, and learning curves."""
    found = read(trim(name, report, {}), "").report
    ranked = {yardstick: metric for yardstick, metric in found.metrics.items() if metric.better}
    pictures = {SEEDS: draw_seeds(ranked, found.variants, found.untrained)}
    curves = read_curves(report)
    pictures |= {f"curves {yardstick}": draw_curves(curves, found.variants, yardstick) for yardstick in DRAWN}
    for which, picture in pictures.items():
        if picture:
            (docs / file_of(name, which)).write_bytes(picture)


def parent_of(folder: Path) -> str:
    """Find the MLflow run of the comparison whose report lies in a folder."""
    state = folder.parent / "comparison.json"
    if not state.is_file():
        raise SystemExit(f"{state}: not found; --uri needs the output folder of the comparison as it was left.")
    return json.loads(state.read_text(encoding="utf-8"))["mlflow_run_id"]


def stored_numbers(docs: Path) -> dict[str, Results]:
    """Read every comparison that was ever taken, by its name."""
    files = sorted(docs.glob("results_*.json"))
    return {file.stem.removeprefix("results_"): read(json.loads(file.read_text(encoding="utf-8")), "")
            for file in files}  # fmt: skip


def check_markers(texts: Mapping[Path, str], names: Mapping[str, object]) -> None:
    """Refuse pages whose blocks are not closed, or that do not show a comparison.

    Raises:
        SystemExit: with the marker that is missing.
    """
    for page, text in texts.items():
        closed = {match.start() for match in BLOCK.finditer(text) if not OPENING.search(match["body"])}
        for opening in OPENING.finditer(text):
            if opening.start() not in closed:
                raise SystemExit(f"{page}: no `<!-- end -->` on a line below `{opening[0]}`.")
    markers = [match for text in texts.values() for match in OPENING.finditer(text)]
    for name in names:
        shown = {match["what"].partition(" ")[0] for match in markers if match["name"] == name}
        for kind in REQUIRED_OF_RATES if "rates" in shown else REQUIRED:
            if kind not in shown:
                expected = f"`<!-- results {name}: {kind}{' accuracy' * (kind == 'ranking')} -->` and `<!-- end -->`"
                where = " or ".join(map(str, texts))
                raise SystemExit(f"{where}: no block {kind!r} of {name!r}; put {expected} where it belongs.")


def fill(page: Path, text: str, stored: Mapping[str, Results], docs: Path) -> str:
    """Make the blocks of a page from the numbers; blocks of comparisons that are not stored stay as they are.

    Args:
        page: where the text comes from.
        text: of the page.
        stored: by the name of the comparison.
        docs: folder of the figures.

    Raises:
        SystemExit: a marker that cannot be filled.
    """
    folder = os.path.relpath(docs, page.parent)
    figures = "" if folder == os.curdir else f"{folder}/"

    def filled(match: re.Match[str]) -> str:
        if match["name"] not in stored:
            return match[0]
        opening, results = match[0].partition("\n")[0], replace(stored[match["name"]], figures=figures)
        try:
            return f"{opening}\n\n{block(match['what'], results)}\n\n{match['end']}"
        except LookupError as error:
            raise SystemExit(f"{page}: `{opening}`: {error.args[0]}.") from error

    return BLOCK.sub(filled, text)


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name) or not folder:
        raise SystemExit(f"{text!r}: expected NAME=FOLDER, e.g. tiny=outputs/results_tiny/report.")
    return name, Path(folder)


if __name__ == "__main__":
    main()
