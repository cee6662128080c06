"""What evaluations leave in MLflow, by `fit` as users start it."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from lit_opd.cli import main

NAMES = ("completions_{}.html", "log_ratios_{}.png", "positions_{}.json", "positions_{}.png")


def artifacts(workspace):
    (run,) = workspace.runs
    return sorted(file.path for file in workspace.client.list_artifacts(run.info.run_id, "diagnostics"))


def test_every_evaluation_leaves_its_pictures_numbers_and_completions(workspace):
    words = ["trainer.max_steps=3", "diagnostics.support_size=3", "diagnostics.figures=true"]
    assert main(workspace.arguments("fit", *words)) == 0
    expected = [f"diagnostics/{name.format(step)}" for name in NAMES for step in ("000000", "000003", "teacher_000000")]
    assert artifacts(workspace) == sorted(expected)
    (run,) = workspace.runs
    folder = Path(workspace.client.download_artifacts(run.info.run_id, "diagnostics", str(workspace.folder)))
    assert imread(folder / "positions_000003.png").shape[1] == 900
    numbers = json.loads((folder / "positions_000003.json").read_text())
    assert (numbers["step"], numbers["judged"], numbers["support_size"]) == (3, "student", 3)
    tokens, means = numbers["tokens"], numbers["values"]["reverse_kl"]["mean"]
    assert len(tokens) == 8
    logged = {m.step: m.value for m in workspace.client.get_metric_history(run.info.run_id, "val/reverse_kl")}
    whole = sum(n * (mean or 0) for n, mean in zip(tokens, means, strict=True)) / sum(tokens)
    assert whole == pytest.approx(logged[3], rel=1e-4)
    quarter = sum(n * mean for n, mean in zip(tokens[:2], means[:2], strict=True)) / sum(tokens[:2])
    assert run.data.metrics["position/reverse_kl_q1"] == pytest.approx(quarter, rel=1e-4)
    assert {"support/overlap", "support/student_mass", "support/teacher_mass"} <= run.data.metrics.keys()
    teacher = json.loads((folder / "positions_teacher_000000.json").read_text())
    assert teacher["judged"] == "teacher"
    assert max(map(abs, filter(None, teacher["values"]["log_ratio"]["mean"])), default=0) < 1e-6
    assert (folder / "completions_000003.html").read_text().count("<section>") == 3


def test_without_figures_there_are_none(workspace):
    assert main(workspace.arguments("fit", "trainer.max_steps=1", "diagnostics.figures=false")) == 0
    assert artifacts(workspace) == []
