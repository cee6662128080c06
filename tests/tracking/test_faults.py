"""A tracker that fails while a run tells it of itself: the run goes on, and nothing is lost or told twice."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.tracking import MlflowClient

from lit_opd.errors import UserError
from lit_opd.tracking import RunLogger, check_tracking, log_files, log_table, mailbox, send_kept


class Server:
    """A real MLflow server on a database, to be killed, stopped and started again."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Start it, and wait until it answers."""
        uri, where = f"sqlite:///{self.folder / 'mlflow.db'}", ["--host", "127.0.0.1", "--port", str(self.port)]
        own = ["--artifacts-destination", str(self.folder / "served"), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, *where, *own]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
                                        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})  # fmt: skip
        while self.process.poll() is None:
            with suppress(OSError), urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.1)

    def send(self, number):
        os.killpg(self.process.pid, number)


@pytest.fixture(scope="module")
def server(tmp_path_factory, database):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(database, folder / "mlflow.db")
    made = Server(folder)
    made.start()
    yield made
    made.send(signal.SIGCONT)
    made.send(signal.SIGKILL)


@contextmanager
def hanging(server, logger):
    server.send(signal.SIGSTOP)
    yield
    server.send(signal.SIGCONT)


@contextmanager
def gone(server, logger):
    server.send(signal.SIGKILL)
    server.process.wait()
    yield
    server.start()


@contextmanager
def deleted(what, server, logger):
    client, identity = MlflowClient(f"sqlite:///{server.folder / 'mlflow.db'}"), getattr(logger, f"{what}_id")
    getattr(client, f"delete_{what}")(identity)
    yield
    getattr(client, f"restore_{what}")(identity)


@contextmanager
def locked(server, logger):
    holder = sqlite3.connect(server.folder / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    yield
    holder.execute("ROLLBACK")
    holder.close()


@contextmanager
def artifacts_full(server, logger):
    place = server.folder / "served"
    place.rename(server.folder / "aside")
    place.touch()  # a file, in which no folder can be made
    yield
    place.unlink()
    (server.folder / "aside").rename(place)


def tell(logger, step):
    logger.log_metrics({"train/loss": 1.0 / (step + 1), "epoch": 0.0}, step)
    logger.log_metrics({"val/loss": 1.0 / (step + 1), "epoch": 0.0}, step)
    log_table(logger, {"step": [step], "policy": ["student"], "prompt": ["a"]}, "completions.json")
    log_files(logger, {f"{step}.txt": str(step)}, "diagnostics")


def held(uri, run_id, folder):
    """What MLflow has of a run: how often each point, the rows, the files."""
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    points = Counter((p.key, p.step) for key in run.data.metrics for p in client.get_metric_history(run_id, key))
    place = Path(client.download_artifacts(run_id, "", str(folder)))
    return run, points, sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())


FAULTS = {
    "hanging": (hanging, "timed out|no answer"),
    "gone": (gone, "Connection"),
    "run deleted": (partial(deleted, "run"), "the run was deleted"),
    "experiment deleted": (partial(deleted, "experiment"), "the experiment 'experiment deleted' was deleted"),
    "locked": (locked, "locked|no answer|timed out"),
    "artifacts": (artifacts_full, "."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_outlives_its_tracker_and_nothing_is_lost(server, fault, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    breaking, words = FAULTS[fault]
    logger = RunLogger(fault, run_name="r", tracking_uri=server.uri, keep_in=tmp_path / "unsent")
    tell(logger, 0)
    assert capfd.readouterr().err == ""
    began = time.monotonic()
    with breaking(server, logger), monkeypatch.context() as patch:
        patch.setattr(mailbox, "LIMIT_S", 1.0)
        for step in (1, 2):
            tell(logger, step)
        logger.end("FINISHED")
        assert time.monotonic() - began < 20
        failed, left = [line for line in capfd.readouterr().err.splitlines() if " INFO " not in line]
    assert re.match(f"warning: MLflow at {server.uri} fails: .*({words}).* The run goes on;", failed)
    assert "python -m lit_opd sync" in left
    send_kept(server.uri, tmp_path)
    with pytest.raises(UserError, match="nothing to do"):
        send_kept(server.uri, tmp_path)
    run, points, files = held(server.uri, logger.run_id, tmp_path)
    assert points == {(key, step): 1 for key in ("train/loss", "val/loss", "epoch") for step in range(3)}
    assert run.info.status == "FINISHED"
    assert files == ["completions.json", *(f"diagnostics/{step}.txt" for step in range(3))]


def test_a_table_that_cannot_be_read_for_a_while_is_no_refusal(server, tmp_path, capfd, monkeypatch):
    """MLflow says of a file whose download failed, whatever the cause, that there is none."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logger = RunLogger("unread", run_name="r", tracking_uri=server.uri, keep_in=tmp_path / "unsent")
    tell(logger, 0)

    def download(*args, **options):
        raise OSError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(HttpArtifactRepository, "download_artifacts", download)
        tell(logger, 1)
        logger.end("FINISHED")
    assert "Failed to download artifacts" in capfd.readouterr().err
    assert not (tmp_path / "unsent" / "refused.jsonl").exists()
    send_kept(server.uri, tmp_path)
    (tmp_path / "held").mkdir()
    _, points, files = held(server.uri, logger.run_id, tmp_path / "held")
    assert {step for _, step in points} == {0, 1}
    assert files == ["completions.json", "diagnostics/0.txt", "diagnostics/1.txt"]
    assert len(json.loads((tmp_path / "held" / "completions.json").read_text())["data"]) == 2


def test_fit_ends_well_while_its_server_hangs_and_the_command_sends_the_rest(server, make_workspace, monkeypatch):
    """The password of the server is shown nowhere meanwhile."""
    monkeypatch.setenv("OPD_PASSWORD", "hunter22")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    workspace = make_workspace("hanging", f"tracking.uri=http://me:${{oc.env:OPD_PASSWORD}}@127.0.0.1:{server.port}")
    process = workspace.start(*workspace.arguments("fit"), python=workspace.python)
    while not workspace.checkpoint.is_file() and process.poll() is None:
        time.sleep(0.01)
    server.send(signal.SIGSTOP)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        server.send(signal.SIGCONT)
    assert process.returncode == 0, err
    shown = f"http://me:${{oc.env:OPD_PASSWORD}}@127.0.0.1:{server.port}"
    assert f"MLflow: {shown}/#/experiments/" in out
    failed, left = [line for line in err.splitlines() if line.startswith("warning: MLflow")]
    assert failed.startswith(f"warning: MLflow at {shown} fails: ")
    assert "python -m lit_opd sync" in left
    synced = workspace.run(*workspace.arguments("sync"))
    assert synced.returncode == 0, synced.stderr
    run_id = json.loads((workspace.output / "run.json").read_text())["mlflow_run_id"]
    run, points, files = held(server.uri, run_id, workspace.folder)
    assert run.info.status == "FINISHED"
    assert set(points.values()) == {1}
    assert {step for name, step in points if name == "train/loss"} == set(range(1, 9))
    assert {"config.yaml", "completions.json", "summary.json", "prompts.json"} <= set(files)
    assert run.data.params["tracking.uri"] == shown
    for text in (out, err, synced.stdout, *written(workspace, server)):
        assert "hunter22" not in text
    again = workspace.run(*workspace.arguments("sync"))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


def written(*places):
    """All that is in the run's folder, and in the server's database and artifacts."""
    files = [file for place in places for file in place.folder.rglob("*") if file.is_file()]
    return [file.read_bytes().decode(errors="ignore") for file in files if file.suffix != ".safetensors"]


def test_a_server_that_never_answers_is_refused_in_seconds(monkeypatch):
    monkeypatch.setattr("lit_opd.tracking.store.ANSWER_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # which would be made of that otherwise, for all tests
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match=r"expected an MLflow server that answers, .*: no answer within 1 s"):
            check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
