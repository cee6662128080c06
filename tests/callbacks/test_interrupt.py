import os
import signal
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lit_opd.callbacks import SaveOnInterrupt
from lit_opd.optim import NonFiniteStepError
from lit_opd.stopping import Stopped, StoppedWaiting, end_wait


class FakeTrainer:
    def __init__(self):
        self.saved, self.global_step = [], 1
        self.state, self.sanity_checking, self.world_size = SimpleNamespace(fn=TrainerFn.FITTING), False, 1
        self.strategy = SimpleNamespace(
            root_device="cpu", reduce_boolean_decision=lambda decision, all: decision,
            reduce=lambda tensor, reduce_op: tensor,
        )  # fmt: skip

    def save_checkpoint(self, path):
        path.write_text("checkpoint")
        self.saved.append(path)


@pytest.fixture
def trainer():
    return FakeTrainer()


@pytest.fixture
def callback(tmp_path, trainer):
    made = SaveOnInterrupt(tmp_path / "last.ckpt")
    before = signal.getsignal(signal.SIGINT)
    made.on_train_start(trainer, None)
    yield made
    made.on_train_end(trainer, None)
    assert signal.getsignal(signal.SIGINT) is before


def step(callback, trainer):
    callback.on_train_batch_start(trainer, None, None, 0)
    callback.on_train_batch_end(trainer, None, None, None, 0)


def test_nothing_happens_without_signal(callback, trainer):
    step(callback, trainer)
    step(callback, trainer)
    callback.on_validation_batch_start(trainer, None, None, 0)
    callback.on_validation_batch_end(trainer, None)
    assert trainer.saved == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_signal_lets_the_step_finish_saves_and_ends_at_what_comes_next(callback, trainer, capsys, number, hook):
    callback.on_train_batch_start(trainer, None, None, 0)
    os.kill(os.getpid(), number)
    assert "finishing this step" in capsys.readouterr().err
    assert trainer.saved == []
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert trainer.saved == [callback.path]
    with pytest.raises(KeyboardInterrupt):
        getattr(callback, hook)(trainer, None, None, 1)
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert "--resume auto" in capsys.readouterr().err


def test_a_signal_to_another_process_saves_and_ends_this_one_with_its_number(callback, trainer, monkeypatch):
    monkeypatch.setattr(trainer.strategy, "reduce_boolean_decision", lambda decision, all: not all)
    monkeypatch.setattr(trainer.strategy, "reduce", lambda tensor, reduce_op: tensor.clamp(min=int(signal.SIGTERM)))
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert trainer.saved == [callback.path]
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        callback.on_train_batch_start(trainer, None, None, 1)


def test_second_signal_ends_at_once(callback, trainer):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert trainer.saved == []


def test_non_finite_step_saves_the_weights_of_before(callback, trainer, capsys):
    callback.on_exception(trainer, None, NonFiniteStepError(float("nan"), 1.0, 3, 3, "1+1="))
    assert trainer.saved == [callback.path]
    assert "--resume auto" in capsys.readouterr().err


def test_other_errors_save_nothing(callback, trainer, capsys):
    callback.on_exception(trainer, None, ValueError("a bug"))
    assert trainer.saved == []
    assert capsys.readouterr().err == ""


def test_interrupt_before_the_first_checkpoint_promises_none(callback, trainer, capsys):
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wait_that_lasts_is_given_up_and_what_was_before_it_saved(tmp_path, trainer, processes):
    """With several processes it goes on, for the others could not know."""
    callback, trainer.world_size = SaveOnInterrupt(tmp_path / "last.ckpt"), processes
    callback.on_train_start(trainer, None)
    end_wait()
    os.kill(os.getpid(), signal.SIGTERM)
    if processes == 2:
        end_wait()
    else:
        with pytest.raises(StoppedWaiting, match="stopped by SIGTERM") as stop:
            end_wait()
        callback.on_exception(trainer, None, stop.value)
        assert trainer.saved == [callback.path]
    callback.on_train_end(trainer, None)
    end_wait()  # nothing of it is left for the next run
