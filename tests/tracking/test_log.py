"""What is handed to tracking reaches the store, by one road, and nobody where there is none."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from mlflow.tracking import MlflowClient

from lit_opd.tracking import RunLogger, log_files, log_metrics, log_table, log_tag, logger_of


@pytest.fixture
def logger(tmp_path, database):
    shutil.copy(database, tmp_path / "runs.db")
    made = RunLogger("tests", run_name="run", tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}",
                     artifact_location=str(tmp_path / "artifacts"))  # fmt: skip
    made.begin()
    return made


class Other(DummyLogger):
    def __init__(self):
        super().__init__()
        self.points = []

    def log_metrics(self, metrics, step=None):
        self.points.append((metrics, step))


def test_metrics_reach_every_logger_and_a_mean_over_nothing_is_no_point(logger):
    other = Other()
    log_metrics(SimpleNamespace(loggers=[other, logger]), {"a/b": 1.5, "a/c": math.nan}, step=7)
    ((found, step),) = other.points
    assert (found["a/b"], step) == (1.5, 7)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics == {"a/b": 1.5}
    assert [point.step for point in logger.experiment.get_metric_history(logger.run_id, "a/b")] == [7]


def test_tags_tables_and_files_are_kept_with_the_run(logger, tmp_path):
    log_tag(logger, "collapse", "step 3")
    for number in (1, 2):
        log_table(logger, {"step": [number], "text": ["ü"]}, "table.json")
    log_files(logger, {"a.txt": "ü", "b.bin": b"\x00\x01"}, "folder")
    log_files(logger, {"c.txt": "c"})
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs.db'}")
    assert client.get_run(logger.run_id).data.tags["collapse"] == "step 3"
    place = Path(client.download_artifacts(logger.run_id, "", str(tmp_path)))
    assert json.loads((place / "table.json").read_text())["data"] == [[1, "ü"], [2, "ü"]]
    assert (place / "folder" / "a.txt").read_bytes() == "ü".encode()
    assert (place / "folder" / "b.bin").read_bytes() == b"\x00\x01"
    assert (place / "c.txt").read_text() == "c"


def test_only_the_first_process_has_a_logger_to_hand_values_to(logger):
    trainer = SimpleNamespace(loggers=[Other(), logger], is_global_zero=True)
    assert logger_of(trainer) is logger
    assert logger_of(SimpleNamespace(loggers=[Other()], is_global_zero=True)) is None
    assert logger_of(SimpleNamespace(loggers=[logger], is_global_zero=False)) is None
    log_tag(None, "a", "b")
    log_table(None, {"a": [1]}, "a.json")
    log_files(None, {"a": "b"})
