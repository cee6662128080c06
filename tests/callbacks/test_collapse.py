"""A run that goes wrong is told of, once, and can be stopped."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from mlflow.tracking import MlflowClient

from lit_opd.callbacks import WatchCollapse
from lit_opd.callbacks.collapse import SIGNS, CollapseWarning
from lit_opd.cli import main
from lit_opd.config import CollapseConfig

GOOD = {"train/entropy": 1.0, "rollout/repetition_frac": 0.1, "rollout/truncated_frac": 0.1}
BAD = {"train/entropy": 0.0, "rollout/repetition_frac": 0.9, "rollout/truncated_frac": 1.0}
QUICKSTART = "conf/quickstart.yaml"


def watch(steps, action="warn", callback=None, **config):
    """Gives a callback the numbers of steps; returns the warnings of each step, and whether it asked to stop."""
    callback = callback or WatchCollapse(CollapseConfig(action=action, window=3, **config))
    module = SimpleNamespace(seen=[])
    trainer = SimpleNamespace(loggers=[], is_global_zero=True, should_stop=False, global_step=0)
    told = []
    for values in steps:
        trainer.callback_metrics = {name: torch.tensor(value) for name, value in values.items()}
        trainer.global_step += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback.on_train_batch_end(trainer, module, None, None, 0)
        told.append([str(warning.message) for warning in caught])
    return told, trainer.should_stop


@pytest.mark.parametrize("name", list(BAD))
def test_a_sign_is_told_once_when_the_mean_of_the_window_crosses(name):
    told, stopped = watch([GOOD] * 3 + [GOOD | {name: BAD[name]}] * 8)
    steps = [number for number, messages in enumerate(told, start=1) if messages]
    assert len(steps) == 1
    assert steps[0] in (5, 6), "two or three of the last three were bad"
    (message,) = told[steps[0] - 1]
    assert message.startswith(f"step {steps[0]}: {name}, {SIGNS[name].says}, ")
    assert f"collapse.{SIGNS[name].key}=" in message
    assert message.endswith("Set collapse.action=stop to end the run at that.")
    assert not stopped


def test_it_stops_where_it_is_asked_to():
    told, stopped = watch([GOOD] * 3 + [BAD] * 3, action="stop")
    assert stopped
    assert all(message.endswith("The run stops here.") for messages in told for message in messages)


def test_what_begins_badly_is_no_collapse():
    told, _ = watch([BAD] * 9)
    assert not any(told)


def test_a_run_that_was_good_for_a_step_has_collapsed():
    told, _ = watch([GOOD | {"train/entropy": 0.0}] + [BAD] * 3)
    assert [len(messages) for messages in told] == [0, 0, 1, 1], "repetition first; entropy never was good"


def test_limits_at_the_ends_never_warn():
    told, _ = watch([GOOD] * 3 + [BAD] * 9, min_entropy=0.0, max_repetition=1.0, max_truncated=1.0)
    assert not any(told)


def test_a_resumed_run_goes_on_with_what_was_seen():
    numbers = [GOOD] * 3 + [BAD] * 6
    whole, _ = watch(numbers)
    first = WatchCollapse(CollapseConfig(window=3))
    before, _ = watch(numbers[:4], callback=first)
    second = WatchCollapse(CollapseConfig(window=3))
    second.load_state_dict(first.state_dict())
    after, _ = watch(numbers[4:], callback=second)
    counts = [len(messages) for messages in before + after]
    assert counts == [len(messages) for messages in whole]
    assert sum(counts) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_without_a_number_is_no_sign(value):
    unread = dict.fromkeys(GOOD, value)
    told, _ = watch([GOOD, unread, GOOD, unread, GOOD] + [unread] * 9)
    assert not any(told)
    told, _ = watch([GOOD, unread, GOOD, GOOD, unread, BAD, unread, BAD, BAD])
    assert sum(map(len, told)) == 3, "what lies between is not in the mean"


def test_steps_of_demonstrations_alone_are_no_collapse_and_no_points_of_a_curve(tmp_path):
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    words = ["rollout.student_share=0.5", "data.batch_size=1", "rollout.max_new_tokens=2", "optim.lr=1e-6",
             "trainer.max_steps=16", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
             "data.train_size=40", "data.validation_size=2", "evaluation.teacher=false", f"tracking.uri={uri}",
             "tracking.system_metrics=false", f"output_dir={tmp_path / 'run'}", "collapse.action=stop",
             "collapse.window=3", "collapse.max_truncated=1", "diagnostics.figures=false"]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        assert main(["fit", "--config", QUICKSTART, *words]) == 0
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    losses, entropies, lengths = (
        [point.value for point in client.get_metric_history(run.info.run_id, name)]
        for name in ("train/loss", "train/entropy", "rollout/length")
    )
    assert len(losses) == 16
    assert 0 < len(entropies) == len(lengths) < 16
    assert all(value >= 0 for value in entropies)
    assert all(value > 0 for value in lengths)


def test_a_real_run_with_a_huge_learning_rate_is_stopped(tmp_path, monkeypatch):
    """The shipped pair at thirty times its learning rate: completions stop ending, and the run is told so and ends."""
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    words = ["optim.lr=0.03", "optim.warmup_steps=0", "optim.scheduler=null", "estimator.name=token",
             "trainer.max_steps=60", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
             "data.batch_size=16", "data.train_size=2000", "data.validation_size=4", "evaluation.teacher=false",
             "tracking.system_metrics=false", f"tracking.uri={uri}", f"output_dir={tmp_path / 'run'}",
             "collapse.action=stop", "diagnostics.figures=false"]  # fmt: skip
    with pytest.warns(CollapseWarning, match=r"collapse\.max_"):
        assert main(["fit", "--config", QUICKSTART, *words]) == 0
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    assert "in the last steps" in run.data.tags["collapse"]
    assert 10 <= len(client.get_metric_history(run.info.run_id, "train/loss")) < 60
    assert (tmp_path / "run" / "student" / "config.json").is_file()


def test_the_mass_on_the_support_is_of_the_tokens_the_student_wrote(make_model, make_module, fit):
    seen = {}

    class Watch(WatchCollapse):
        def _judge(self, trainer, name):
            seen[name] = self._recent[name][-1]

    module = make_module(make_model(1), make_model(2), "teacher_topk", estimator_kwargs={"k": 4},
                         optim={"micro_batch_tokens": 30})  # fmt: skip
    fit(module, callbacks=[Watch(CollapseConfig())])
    masses = torch.cat([stats["student_mass"] for _, stats in module.seen])
    assert len(module.seen) > 1
    assert seen["train/student_mass"] == pytest.approx(masses.mean().item(), rel=1e-6)
