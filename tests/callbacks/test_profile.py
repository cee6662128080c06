"""Steps under the profiler: what is written, what does not change, and what ends a recording."""

import gzip
import json
import math
import signal
from statistics import median
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lit_opd.callbacks import ProfileSteps, SaveOnInterrupt, StepSpeed
from lit_opd.config import StudentConfig
from lit_opd.perf import PHASES, STEP


@pytest.fixture
def dropping(make_model, save_model):
    """A student whose dropout draws random numbers."""
    return StudentConfig(save_model(make_model(1, attention_dropout=0.3)), dropout="keep")


@pytest.fixture
def train(dropping, make_model, make_module, fit, tmp_path):
    """Trains under the profiler; returns the callback and the record of the run."""

    def run(steps, callbacks=(), *, profile=None, estimator="full_vocab", trainer=None, **module):
        profile = profile or ProfileSteps(tmp_path / "profile")
        made = make_module(dropping, make_model(2, hidden_size=24), estimator, **module)
        return profile, fit(made, steps, callbacks=[profile, *callbacks], **(trainer or {}))

    return run


def ranges(folder):
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return [e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"] in (STEP, *PHASES)]


def test_three_steps_after_two_are_recorded(train, capsys):
    profile, _ = train(8)
    found = profile.breakdown
    assert found.steps == 3
    assert sorted(ranges(profile.folder)) == sorted((STEP, *PHASES) * 3)
    assert list(found.phases) == ["rollout", "teacher", "student", "student/head", "optimizer", "other"]
    assert sum(part.seconds for part in found.phases.values()) == pytest.approx(found.step_s)
    assert all(part.seconds > 0 for part in found.phases.values())
    assert len(found.operators) == 15
    assert sum(part.seconds for part in found.operators.values()) < found.step_s
    numbers = json.loads((profile.folder / "phases.json").read_text())
    assert numbers["phases"]["rollout"]["seconds"] == found.phases["rollout"].seconds
    assert numbers["peak_memory_before_mb"] > 1
    assert sorted(file.name for file in profile.folder.iterdir()) == ["phases.json", "phases.md", "trace.json.gz"]
    page = (profile.folder / "phases.md").read_text()
    assert all(f"| {name} " in page for name in (*found.phases, *found.operators, STEP, "between steps"))
    printed = capsys.readouterr().out
    assert str(profile.folder) in printed
    assert all(f"| {name} " in printed for name in found.phases)
    assert "peak memory" in printed


def test_the_step_is_the_step_that_is_logged(train):
    """Of the same steps, by another clock; the range is wider by the hooks around the step."""
    speed = StepSpeed()
    profile, _ = train(5, [speed])
    logged = speed.steps["perf/step_s"][2:]
    assert sum(logged) <= profile.breakdown.step_s * 3
    phases = profile.breakdown.phases
    assert phases["student"].seconds + phases["student/head"].seconds + phases["optimizer"].seconds <= (
        sum(speed.steps["perf/student_s"][2:]) / 3
    )
    assert phases["rollout"].seconds <= sum(speed.steps["perf/rollout_s"][2:]) / 3


def test_the_head_is_told_apart_by_who_reads_it(train):
    profile, _ = train(3, estimator="token")
    assert {"teacher/head", "student/head"} <= profile.breakdown.phases.keys()


def test_no_number_changes(train, dropping, make_model, make_module, fit):
    torch.manual_seed(0)
    _, profiled = train(6)
    torch.manual_seed(0)
    plain = fit(make_module(dropping, make_model(2, hidden_size=24)), 6)
    for mine, theirs in zip(profiled.metrics, plain.metrics, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs if not k.startswith("perf/"))
    for mine, theirs in zip(profiled.weights, plain.weights, strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(("steps", "updates", "recorded"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 2), (4, 2, 1)])
def test_a_short_run_records_fewer(train, steps, updates, recorded):
    profile, _ = train(steps, optim={"updates_per_rollout": updates})
    assert profile.breakdown.steps == recorded


def test_a_run_of_epochs_records_its_last_step(train, tmp_path):
    profile, _ = train(-1, profile=ProfileSteps(tmp_path / "profile", skip=9), trainer={"max_epochs": 2})
    assert profile.breakdown.steps == 1


def test_an_evaluation_ends_the_recording(train):
    profile, _ = train(8, trainer={"limit_val_batches": 1, "val_check_interval": 1})
    assert profile.breakdown.steps == 1
    assert sorted(ranges(profile.folder)) == sorted((STEP, *PHASES))


def test_a_recording_that_lasts_long_ends(train, tmp_path):
    profile, _ = train(8, profile=ProfileSteps(tmp_path / "profile", seconds=0.0))
    assert profile.breakdown.steps == 1


def test_a_finished_run_has_nothing_to_record(train, tmp_path, capsys):
    done = SimpleNamespace(is_global_zero=True, max_steps=3, global_step=3, estimated_stepping_batches=3)
    module = SimpleNamespace(optim_config=SimpleNamespace(updates_per_rollout=1))
    profile = ProfileSteps(tmp_path / "profile")
    profile.on_train_start(done, module)
    profile.on_train_end(done, module)
    profile.teardown(done, module, "fit")
    assert capsys.readouterr().out == "profile: no step to record\n\n"
    assert not profile.folder.exists()


def test_processes_after_the_first_do_nothing(tmp_path, capsys):
    second = SimpleNamespace(is_global_zero=False)
    profile = ProfileSteps(tmp_path / "profile", skip=0)
    profile.on_train_start(second, None)
    for step in range(5):
        profile.on_train_batch_start(second, None, None, step)
        profile.on_train_batch_end(second, None, None, None, step)
    profile.on_train_end(second, None)
    profile.teardown(second, None, "fit")
    assert capsys.readouterr().out == ""
    assert not profile.folder.exists()


class Press(L.Callback):
    """Ctrl-C during a step, once or twice."""

    def __init__(self, times):
        self.times = times

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_recording_ends_the_run_as_without_it(train, tmp_path, times):
    path, profile = tmp_path / "last.ckpt", ProfileSteps(tmp_path / "profile")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(8, [SaveOnInterrupt(path), Press(times)], profile=profile)
    assert path.is_file() == (times == 1)
    assert not profile.folder.exists()
    assert not torch.autograd._profiler_enabled()
    again, _ = train(3)
    assert again.breakdown.steps == 1
    assert sorted(ranges(again.folder)) == sorted((STEP, *PHASES))


def test_speed_is_summed_up_by_medians_and_the_largest_memory():
    speed = StepSpeed()
    for seconds, memory in ((9.0, 10.0), (1.0, 30.0), (2.0, 20.0)):
        metrics = {"perf/step_s": torch.tensor(seconds), "perf/tokens_per_s": 5.0, "perf/peak_memory_mb": memory,
                   "train/loss": math.nan}  # fmt: skip
        speed.on_train_batch_end(SimpleNamespace(callback_metrics=metrics), None, None, None, 0)
    assert speed.typical() == {"perf/step_s": 2.0, "perf/tokens_per_s": 5.0, "perf/peak_memory_mb": 30.0}
    assert speed.state_dict() == {"cost/seconds": 12.0, "cost/tokens": 60.0, "typical": speed.typical()}
    assert StepSpeed().typical() == {}
    resumed = StepSpeed()  # with no step left to make
    resumed.load_state_dict(speed.state_dict())
    assert (resumed.cost, resumed.typical()) == (speed.cost, speed.typical())


def test_speed_is_that_of_the_steps(train):
    speed = StepSpeed()
    _, record = train(3, [speed])
    seconds = [float(metrics["perf/step_s"]) for metrics in record.metrics]
    assert speed.typical()["perf/step_s"] == median(seconds)
