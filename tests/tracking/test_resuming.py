"""A run that is killed and resumed is one run in MLflow, with every point once and nothing that is not so."""

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from workspaces import QUICKSTART

from lit_opd import load_config
from lit_opd.errors import UserError
from lit_opd.tracking import RunLogger, begin_run, check_tracking
from lit_opd.tracking.outbox import Outbox, Refused

TAGS = {"student": "s", "teacher": "t", "estimator": "token"}


def points(workspace, run):
    names = workspace.client.get_run(run.info.run_id).data.metrics
    return Counter(
        (p.key, p.step) for name in names for p in workspace.client.get_metric_history(run.info.run_id, name)
    )


def rows(workspace, run):
    path = workspace.client.download_artifacts(run.info.run_id, "completions.json", str(workspace.folder))
    table = json.loads(Path(path).read_text())
    return Counter((step, policy) for step, policy, *_ in table["data"])


def test_a_resumed_run_is_recorded_once(make_workspace):
    workspace = make_workspace("resumed")
    killed = workspace.stop_after_first_checkpoint(signal.SIGKILL, *workspace.arguments("fit"))
    assert killed.returncode == -signal.SIGKILL
    resumed = workspace.run(*workspace.arguments("fit", "--resume", "auto", "collapse.window=5", "tracking.tags.a=b"))
    assert resumed.returncode == 0, resumed.stderr
    (run,) = workspace.runs
    found = points(workspace, run)
    assert not {place: times for place, times in found.items() if times > 1}
    assert {step for name, step in found if name == "train/loss"} == set(range(1, 9))
    assert run.info.status == "FINISHED"
    assert run.data.tags["changed.collapse.window"] == "5 (was 10)"
    assert run.data.tags["a"] == "b"
    shown = rows(workspace, run)
    assert shown == dict.fromkeys([(0, "before"), (0, "teacher"), (3, "student"), (6, "student"), (8, "student")], 3)
    again = workspace.run(*workspace.arguments("fit", "--resume", "auto", "collapse.window=5", "tracking.tags.a=b"))
    assert again.returncode == 0, again.stderr
    (after,) = workspace.runs
    told = {name for name, _ in points(workspace, after) - found}
    assert all(name.startswith("system/") for name in told), told
    assert rows(workspace, after) == shown
    assert after.info.status == "FINISHED"


@pytest.fixture
def config(tmp_path, database):
    shutil.copy(database, tmp_path)
    return load_config(
        [QUICKSTART], [f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", f"output_dir={tmp_path / 'run'}"]
    )


def test_a_run_whose_beginning_was_killed_leaves_no_other_behind(config):
    folder = Path(config.output_dir)
    first = begin_run(config, TAGS, folder=folder)
    # Killed before the folder says which run it has: the next to begin in it goes on with it.
    second = begin_run(config, TAGS, folder=folder)
    assert second.run_id == first.run_id
    second.log_metrics({"a": 1.0}, 1)
    assert begin_run(config, TAGS, folder=folder).run_id != first.run_id
    assert begin_run(config, TAGS, folder=folder / "other").run_id != first.run_id


def test_names_and_values_that_mlflow_refuses_are_made_to_fit(config):
    logger = begin_run(config, TAGS | {"team@#": "x" * 9000, "team##": "y", "": "z", "../a": "b"})
    names = ["a@b", "a#b", "/a", "a//b", "..", "k" * 400, "k" * 401, "tidy/name"]
    logger.experiment.describe_run(logger.run_id, {name: "v" * 7000 + name for name in names})
    logger.log_metrics(dict.fromkeys(names, 1.0), 3)
    logger.experiment.set_tag(logger.run_id, "@", "tag")
    logger.log_metrics({f"m{number}": 1.0 for number in range(1500)}, 0)
    data = MlflowClient(config.tracking.uri).get_run(logger.run_id).data
    assert len(data.params) == len(names)
    assert len(data.metrics) == len(names) + 1500
    assert {"tidy/name"} < data.params.keys() & data.metrics.keys()
    assert len(set(data.params.values())) == len(names)
    assert all(value.endswith("]") and len(value) == 6000 for value in data.params.values())
    assert {"y", "z", "b", "tag"} < set(data.tags.values())
    assert logger._mailbox.close()


def test_what_mlflow_refuses_for_good_is_put_aside_and_holds_nothing_up(config, capsys):
    logger = begin_run(config, TAGS, folder=Path(config.output_dir))
    for value in ("1", "2"):
        logger.log_hyperparams({"p": value})
    logger.experiment.log_batch(logger.run_id, metrics=[Metric("a", 1.0, 1, 2)])
    logger.end("FINISHED")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow refuses log_batch: ")
    (kept,) = (Path(config.output_dir) / "unsent").iterdir()
    assert json.loads(kept.read_text())["params"][0]["of"]["value"] == "2"
    assert MlflowClient(config.tracking.uri).get_run(logger.run_id).data.metrics == {"a": 1.0}


def test_what_is_refused_and_cannot_be_kept_either_ends_nothing(tmp_path):
    (tmp_path / "file").touch()
    told = []

    def refuse(call):
        raise Refused(call["call"])

    box = Outbox(refuse, tmp_path / "file" / "r.calls.jsonl", lambda kind, error: told.append(kind))
    box.post({"call": "log_batch", "metrics": []})
    box.post({"call": "log_dict", "dictionary": object()})
    assert told == ["unkept", "refused", "lost", "refused"]
    assert not box.waiting


def test_what_was_deleted_is_named(config):
    logger = begin_run(config, TAGS)
    client = MlflowClient(config.tracking.uri)
    client.delete_run(logger.run_id)
    with pytest.raises(UserError, match=r"tracking.uri: .* run \w+ was deleted: `mlflow runs restore` brings it back"):
        begin_run(config, TAGS, logger.run_id)
    client.delete_experiment(logger.experiment_id)
    with pytest.raises(
        UserError, match=r"experiment 'quickstart' was deleted: `mlflow experiments restore --experiment-id"
    ):
        begin_run(config, TAGS)


def test_a_resumed_run_begins_without_its_tracker(config, capsys):
    begun = begin_run(config, TAGS)
    config.tracking.uri, uri = "http://127.0.0.1:9", config.tracking.uri
    check_tracking(config.tracking.uri, begun=True)
    resumed = begin_run(config, TAGS, begun.run_id, Path(config.output_dir))
    resumed.log_metrics({"a": 1.0}, 1)
    resumed.end("FINISHED")
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["warning"] * 2
    again = RunLogger(tracking_uri=uri, run_id=begun.run_id, keep_in=Path(config.output_dir) / "unsent")
    again.begin()
    again.end("FINISHED")
    assert MlflowClient(uri).get_run(begun.run_id).data.metrics == {"a": 1.0}


def test_a_database_that_cannot_be_written_to_is_refused_in_seconds(config, monkeypatch):
    monkeypatch.setattr("lit_opd.tracking.store.ANSWER_S", 0.1)
    uri = config.tracking.uri
    check_tracking(uri)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"tracking.uri: expected an SQLite database .* database is locked"):
            check_tracking(uri)


def test_two_first_runs_make_the_tables_of_a_database_whose_making_was_killed(tmp_path, warm_python):
    words = f"from lit_opd.tracking.store import connect; connect('sqlite:///{tmp_path / 'new.db'}', False)"
    with subprocess.Popen([warm_python, "-c", words]) as killed:
        while not any(tmp_path.rglob("new.db")):
            time.sleep(0.01)
        time.sleep(0.5)
        killed.kill()
    assert [file.name for file in tmp_path.iterdir()] == ["new.db.new"]
    both = [subprocess.Popen([warm_python, "-c", words], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.wait(), process.stderr.read()[-500:])[0] for process in both] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["new.db"]
