"""Loggers beside MLflow, or instead of it: what their own files hold, and what is told where one cannot work."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_opd.cli import main
from lit_opd.config import load_config
from lit_opd.errors import UserError
from lit_opd.runs import train
from lit_opd.tracking import RunLogger, check_loggers, log_metrics, others

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
FEW = (
    "output_dir=run", "tracking.uri=null", "data.train_size=24", "data.validation_size=2", "data.batch_size=4",
    "rollout.max_new_tokens=4", "evaluation.every_n_steps=2", "evaluation.teacher=false", "diagnostics.figures=false",
    "optim.scheduler=null", "trainer.log_every_n_steps=1",
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


@pytest.mark.slow
def test_every_logger_gets_the_numbers_of_a_run_without_mlflow_and_goes_on_with_it(place):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    words = [*FEW, "tracking.also=[csv,tensorboard,wandb]"]
    train(load_config([QUICKSTART], [*words, "trainer.max_steps=2"]))
    outcome = train(load_config([QUICKSTART], [*words, "trainer.max_steps=4"]), resume="auto")
    assert outcome.logger.run_id is None
    assert {path.name for path in place.iterdir()} == {"run"}  # no mlruns, no database
    summary = json.loads((place / "run" / "summary.json").read_text())
    measured = summary["after"]["reverse_kl"]["mean"]
    first, second = (rows(place / "run" / "csv" / f"version_{number}" / "metrics.csv") for number in (0, 1))
    assert [points(one, "train/loss") for one in (first, second)] == [{1: None, 2: None}, {3: None, 4: None}]
    assert points(second, "val/reverse_kl", number=True) == {4: pytest.approx(measured)}
    curves = scalars(place / "run" / "tensorboard")
    assert [*curves["train/loss"]] == [1, 2, 3, 4]
    assert curves["val/reverse_kl"][4] == pytest.approx(measured, rel=1e-6)
    (run_id,) = {file.name.split("-")[-1] for file in (place / "run" / "wandb").glob("offline-run-*")}
    assert (place / "run" / "wandb" / "run_id").read_text() == run_id
    kept = [file.read_bytes() for file in sorted((place / "run" / "wandb").glob("offline-run-*/run-*.wandb"))]
    assert [b"val/reverse_kl" in one for one in kept] == [True, True]
    assert str(measured).encode() in kept[1]
    for hparams in ("csv/version_0", "tensorboard"):
        assert "estimator.name: full_vocab" in (place / "run" / hparams / "hparams.yaml").read_text()


def rows(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


def points(table, name, number=False):
    return {int(row["step"]): float(row[name]) if number else None for row in table if row.get(name)}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_a_logger_beside_mlflow_ends_with_its_run(tmp_path, database):
    shutil.copy(database, tmp_path / "runs.db")
    logger = RunLogger("tests", tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")
    logger.begin()
    logger.others = [CSVLogger(tmp_path, name="csv")]
    trainer = type("Trainer", (), {"loggers": logger.loggers})
    log_metrics(trainer, {"a": 1.5}, 3)
    logger.end("FINISHED")
    run = logger.experiment.get_run(logger.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.5})
    assert points(rows(tmp_path / "csv" / "version_0" / "metrics.csv"), "a", number=True) == {3: 1.5}


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_logger_whose_package_is_missing_is_refused(name, package, monkeypatch):
    monkeypatch.setattr(others, "find_spec", lambda _: None)
    check_loggers(["csv"])
    expected = rf'^tracking\.also: expected the package {package}, found no such package\. Run: pip install "lit_opd\['
    with pytest.raises(UserError, match=expected):
        check_loggers(["csv", name])


def test_a_logger_that_cannot_begin_leaves_nothing(place, monkeypatch):
    monkeypatch.setitem(others.KINDS, "csv", lambda *_: [][0])
    config = load_config([QUICKSTART], [*FEW, "tracking.also=[csv]", "trainer.max_steps=1"])
    with pytest.raises(
        UserError, match=r"^tracking\.also: expected csv to take the run, found list index out of range"
    ):
        train(config)
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "tracking.also=[tensorbord]"], "tracking.also: expected one of csv, tensorboard, wandb"),
        (["ui"], "tracking.uri: expected an MLflow store, which is needed to show its pages, found null. Set it"),
        (["sync"], "tracking.uri: expected an MLflow store, which is needed to send it what a run kept, found null."),
    ],
)
def test_what_cannot_be_without_mlflow_says_so(words, message, place, capsys):
    command, *more = words
    assert main([command, "--config", str(QUICKSTART), *FEW, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_a_comparison_without_mlflow_is_refused(place, capsys):
    file = QUICKSTART.parent / "compare" / "quickstart.yaml"
    assert main(["compare", "--config", str(file), "tracking.uri=null"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: tracking.uri: expected a value of type str, found None")
