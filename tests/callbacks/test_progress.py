from types import SimpleNamespace

import pytest
import torch

from lit_opd.callbacks import StepProgress


@pytest.fixture
def trainer():
    metrics = {"train/reverse_kl": torch.tensor(0.25), "rollout/length": torch.tensor(12.0), "train/loss": 1.0,
               "val/reverse_kl": torch.tensor(0.5)}  # fmt: skip
    return SimpleNamespace(max_steps=10, global_step=0, callback_metrics=metrics, num_val_batches=[2, 1],
                           testing=False)  # fmt: skip


MODULE = SimpleNamespace(judged="student")


def test_bar_shows_steps_and_the_numbers_to_watch(trainer, capsys):
    bar = StepProgress()
    bar.on_train_start(trainer, MODULE)
    trainer.global_step = 4  # several updates a rollout advance it by several steps
    bar.on_train_batch_end(trainer, MODULE, None, None, 0)
    bar.on_train_end(trainer, MODULE)
    shown = capsys.readouterr().err
    assert "4/10" in shown
    assert "reverse KL=0.25" in shown
    assert "val reverse KL=0.5" in shown
    assert "length=12" in shown
    assert "loss=" not in shown


def test_a_mean_over_nothing_is_not_shown(trainer, capsys):
    trainer.callback_metrics["train/reverse_kl"] = torch.tensor(float("nan"))
    bar = StepProgress()
    bar.on_train_start(trainer, MODULE)
    trainer.global_step = 1
    bar.on_train_batch_end(trainer, MODULE, None, None, 0)
    bar.on_train_end(trainer, MODULE)
    shown = capsys.readouterr().err
    assert "reverse KL=nan" not in shown
    assert "distil" in shown
    assert ", reverse KL" not in shown
    assert "val reverse KL=0.5, length=12" in shown


def test_resumed_bar_begins_where_the_run_was(trainer, capsys):
    trainer.global_step = 7
    bar = StepProgress()
    bar.on_train_start(trainer, MODULE)
    bar.on_train_end(trainer, MODULE)
    assert "7/10" in capsys.readouterr().err


def test_bar_of_a_run_without_number_of_steps_has_no_total(trainer, capsys):
    trainer.max_steps = -1
    bar = StepProgress()
    bar.on_train_start(trainer, MODULE)
    trainer.global_step = 2
    bar.on_train_batch_end(trainer, MODULE)
    bar.on_train_end(trainer, MODULE)
    assert "2step" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_evaluation_names_whom_it_measures_and_vanishes(trainer, capsys, stage):
    bar = StepProgress()
    trainer.num_test_batches, trainer.testing = trainer.num_val_batches, stage == "test"
    getattr(bar, f"on_{stage}_start")(trainer, SimpleNamespace(judged="teacher"))
    for _ in range(3):
        getattr(bar, f"on_{stage}_batch_end")(trainer, MODULE, None, None, 0)
    assert bar._evaluation.n == 3
    assert bar._evaluation.total == 3
    getattr(bar, f"on_{stage}_end")(trainer, MODULE)
    shown = capsys.readouterr().err
    assert "measure the teacher" in shown
    assert shown.endswith("\r")


def test_disabled_bar_is_silent(trainer, capsys):
    bar = StepProgress()
    bar.disable()
    bar.on_validation_start(trainer, MODULE)
    bar.on_validation_end(trainer, MODULE)
    bar.on_train_start(trainer, MODULE)
    bar.on_train_batch_end(trainer, MODULE)
    bar.on_train_end(trainer, MODULE)
    assert capsys.readouterr().err == ""


def test_error_closes_the_bars(trainer, capsys):
    bar = StepProgress()
    bar.on_exception(trainer, MODULE, ValueError())
    bar.on_train_start(trainer, MODULE)
    bar.on_validation_start(trainer, MODULE)
    bar.on_exception(trainer, MODULE, ValueError())
    assert bar._bar.disable  # which tqdm sets when a bar is closed
    assert capsys.readouterr().err.endswith("\n")
