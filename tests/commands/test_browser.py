"""MLflow's stock pages in a real browser: which estimator, at what cost?

With LIT_OPD_SCREENSHOTS=FOLDER the pages are left there as pictures. Those of README show longer runs, and come from
tools/make_pictures.py, by the same steps.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from commands.test_ui import ask, free_port

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import browser

from lit_opd.cli import main

ESTIMATORS = ("full_vocab", "token")
FEW = ("trainer.max_steps=4", "evaluation.every_n_steps=2", "evaluation.teacher=false", "tracking.system_metrics=false")
COLUMNS = {
    "tags.`estimator`", "tags.`variant`", "tags.`seed`", "metrics.`val/reverse_kl`", "metrics.`val/accuracy`",
    "metrics.`cost/tokens`",
    "metrics.`cost/seconds`", "attributes.`Dataset`",
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # above the browser's patience, which says what it waited for
    pytest.mark.skipif(bool(browser.missing()), reason=str(browser.missing())),
]


@pytest.fixture(scope="module")
def served(make_workspace):
    """Two runs of `fit` in a store that `python -m lit_opd ui` serves: workspace, address, {estimator: run}."""
    made = make_workspace("browser", *FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        for name in ESTIMATORS:
            assert (
                main(
                    made.arguments(
                        "fit", f"estimator.name={name}", f"output_dir={name}", f"tracking.tags.variant={name}"
                    )
                )
                == 0
            )
    port = free_port()
    process = made.start(*made.arguments("ui", "--port", str(port)), python=made.python)
    address = f"http://127.0.0.1:{port}"
    try:
        ask(address, process)
        yield made, address, {run.data.tags["estimator"]: run for run in made.runs}
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def pages(served):
    with browser.open_pages(served[1]) as opened:
        yield opened


@pytest.fixture
def photograph(pages, tmp_path):
    def photograph(name):
        pages.photograph(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        if folder := os.environ.get("LIT_OPD_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / name, folder)

    return photograph


def history(workspace, run, name):
    points = workspace.client.get_metric_history(run.info.run_id, name)
    return [value for _, value in sorted({point.step: point.value for point in points}.items())]


def test_the_table_tells_estimators_quality_cost_and_data(pages, served, photograph):
    _, _, runs = served
    pages.open_table(runs["token"].info.experiment_id)
    photograph("mlflow_table.png")
    pages.resize(2500, browser.WINDOW[1])  # what lies outside of the window is not drawn
    browser.wait_for(lambda: set(pages.columns()) >= COLUMNS, f"not all of the columns {COLUMNS}")
    rows = pages.run(browser.ROWS)
    pages.resize(*browser.WINDOW)
    assert set(rows) == {run.info.run_id for run in runs.values()}
    for name, run in runs.items():
        row = rows[run.info.run_id]
        assert row["tags.`estimator`"] == name
        for metric in ("val/reverse_kl", "val/accuracy", "cost/tokens", "cost/seconds"):
            assert float(row[f"metrics.`{metric}`"]) == pytest.approx(run.data.metrics[metric])
        digests = {entry.dataset.digest for entry in run.inputs.dataset_inputs}
        assert len(digests) == 2
        assert all(f"problems ({digest})" in row["attributes.`Dataset`"] for digest in digests)
        assert "Training" in row["attributes.`Dataset`"]


def test_selected_runs_are_compared_with_their_costs_side_by_side(pages, served):
    _, _, runs = served
    rows = pages.open_table(runs["token"].info.experiment_id)
    pages.select(list(rows))
    text = pages.compare()
    assert "Comparing 2 Runs" in text
    for name, run in runs.items():
        assert f"{name} · student <- teacher · seed 0" in text
        assert run.info.run_id in text
    for metric in ("cost/tokens", "cost/seconds"):  # further down, the table shows what it is scrolled to
        assert metric in text.splitlines()
        assert all(f"{run.data.metrics[metric]:.3f}".rstrip("0").rstrip(".") in text for run in runs.values())


def test_charts_draw_a_line_for_each_run_over_the_tokens_it_cost(pages, served, photograph):
    workspace, _, runs = served
    charts = pages.open_charts(runs["token"].info.experiment_id)
    assert all(title.startswith("val/") for title in charts)
    assert {"val/accuracy", "val/reverse_kl"} <= charts.keys()
    for title, lines in charts.items():
        assert lines.keys() == {run.info.run_id for run in runs.values()}
        for run in runs.values():
            xs, ys = lines[run.info.run_id]
            expected = history(workspace, run, "cost/tokens"), history(workspace, run, title)
            assert len(expected[0]) == len(expected[1]) == 3
            assert (xs[:3], ys[:3]) == tuple(pytest.approx(values, rel=1e-5) for values in expected)
    photograph("mlflow_compare.png")


def test_a_run_shows_its_completions_as_a_table(pages, served, photograph):
    workspace, _, runs = served
    run = runs["token"].info
    path = workspace.client.download_artifacts(run.run_id, "completions.json", str(workspace.folder))
    logged = json.loads(Path(path).read_text())
    header, *rows = pages.open_artifact(run.experiment_id, run.run_id, "completions.json")
    assert header == logged["columns"]
    place = header.index("completion")
    assert [row[place] for row in rows] == [row[place] for row in logged["data"]]
    place_on_disk = f"{run.run_id}/artifacts/completions.json"
    assert place_on_disk in pages.text()
    photograph("mlflow_completions.png")
    assert place_on_disk not in pages.text()


def test_models_are_named_after_what_made_them(pages, served):
    _, _, runs = served
    text = pages.open_models(runs["token"].info.experiment_id)
    for name in ESTIMATORS:
        assert f"{name} seed 0" in text.splitlines()
        assert f"{name} · student <- teacher · seed 0" in text
