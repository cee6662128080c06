"""A place to run commands in: the shipped pair, few prompts, few steps, a database of its own. Conftests import it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from warm import in_turn

QUICKSTART = Path(__file__).parents[1] / "conf" / "quickstart.yaml"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2",
               "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING": "1"}  # fmt: skip
# 24 prompts in batches of 4: 8 steps cross the end of an epoch. Checkpoints at steps 3 and 6.
OVERRIDES = (
    "output_dir=run", "trainer.max_steps=8", "trainer.log_every_n_steps=1", "data.train_size=24",
    "data.validation_size=6", "data.batch_size=4", "rollout.max_new_tokens=8", "rollout.num_completions=2",
    "optim.warmup_steps=2", "evaluation.every_n_steps=3", "evaluation.num_examples=3",
    "evaluation.num_completions=2", "evaluation.pass_at=[1,2]", "tracking.experiment=tests",
    "diagnostics.figures=false",  # half of the time of such a run
)  # fmt: skip


@dataclass
class Workspace:
    folder: Path
    config: Path  # of the shipped pair with `OVERRIDES`: to merge these one by one takes half of what a mistake takes
    python: str  # the warm one; `start` takes the cold one, whose processes are children of the test
    own: tuple[str, ...] = ()

    def arguments(self, command, *extra):
        return [command, "--config", str(self.config), f"tracking.uri={self.uri}", *self.own, *extra]

    def start(self, *words, python=sys.executable):
        command = [python, "-m", "lit_opd", *words]
        return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **ENVIRONMENT}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, *words):
        process = self.start(*words, python=self.python)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def stop_after_first_checkpoint(self, number, *words):
        """Start a run, send a signal as soon as a checkpoint is there, and wait for the end."""
        process = self.start(*words, python=self.python)
        deadline = time.monotonic() + 240
        while not self.checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    @property
    def uri(self):
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def output(self):
        return self.folder / "run"

    @property
    def checkpoint(self):
        return self.output / "checkpoints" / "last.ckpt"

    @property
    def client(self):
        return MlflowClient(self.uri)

    @property
    def runs(self):
        experiment = self.client.get_experiment_by_name("tests")
        return self.client.search_runs([experiment.experiment_id]) if experiment else []


@pytest.fixture(scope="session")
def database(of_all_workers, tmp_path_factory):
    """An SQLite file with MLflow's tables, to copy; making them takes MLflow seconds, so that all workers have one."""
    path = of_all_workers / "database" / "mlflow.db"
    with in_turn(of_all_workers / "database.turn"), pytest.MonkeyPatch.context() as patch:
        if not path.exists():
            path.parent.mkdir()
            patch.chdir(path.parent)
            MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def scratch(tmp_path, database):
    """A folder with what documents read of a checkout, and with the tables in which they record their runs."""
    for name in ("conf", "tools", "docs"):
        (tmp_path / name).symlink_to(QUICKSTART.parents[1] / name)
    shutil.copy(database, tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory, database, warm_python):
    config = tmp_path_factory.mktemp("config") / "few_steps.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(QUICKSTART), OmegaConf.from_dotlist([*OVERRIDES])), config)

    def make(name, *own):
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(database, folder)
        return Workspace(folder, config, str(warm_python), own)

    return make


@pytest.fixture
def workspace(make_workspace, monkeypatch):
    made = make_workspace("workspace")
    monkeypatch.chdir(made.folder)
    return made


@pytest.fixture(autouse=True)
def ctrl_c_works():
    # A test runner started in the background ignores it, and in-process runs would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
