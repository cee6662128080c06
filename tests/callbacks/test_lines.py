"""Where no terminal shows a bar, a run tells its progress in plain lines."""

import re
from types import SimpleNamespace

import pytest
import torch

from lit_opd.callbacks import StepLines, StepProgress
from lit_opd.config import load_config
from lit_opd.runs.lightning_trainer import build_evaluation_trainer


@pytest.fixture
def trainer():
    metrics = {"train/reverse_kl": torch.tensor(0.25), "rollout/length": torch.tensor(12.0)}
    return SimpleNamespace(max_steps=20, global_step=0, callback_metrics=metrics)


def told(lines, trainer, steps, updates, capsys):
    module = SimpleNamespace(judged="teacher", optim_config=SimpleNamespace(updates_per_rollout=updates))
    lines.on_validation_start(trainer, module)
    lines.on_train_start(trainer, module)
    for _ in range(steps):
        trainer.global_step += updates
        lines.on_train_batch_end(trainer, module, None, None, 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_comes_every_n_steps_and_after_the_first(trainer, capsys):
    measuring, *steps = told(StepLines(5), trainer, 20, 1, capsys)
    assert measuring == "step 0: measuring the teacher"
    assert [line.partition(",")[0] for line in steps] == [f"step {n}/20" for n in (1, 5, 10, 15, 20)]
    assert re.fullmatch(r"step 20/20, \d+:\d\d:\d\d, 0:00:00 left: reverse KL 0.25, length 12", steps[-1])


def test_steps_are_the_optimizers_and_a_resumed_run_counts_its_own_time(trainer, capsys):
    trainer.global_step = 12
    _, *steps = told(StepLines(5), trainer, 2, 4, capsys)
    assert [line.partition(",")[0] for line in steps] == ["step 16/20", "step 20/20"]


def test_a_run_of_no_known_length_has_no_time_left_and_none_of_0_has_lines(trainer, capsys):
    trainer.max_steps = -1
    _, line = told(StepLines(5), trainer, 1, 1, capsys)
    assert re.fullmatch(r"step 1, \d+:\d\d:\d\d: reverse KL 0.25, length 12", line)
    assert len(told(StepLines(0), trainer, 3, 1, capsys)) == 1
    silent = StepLines(1)
    silent.disable()
    assert told(silent, trainer, 3, 1, capsys) == []


@pytest.mark.parametrize(("terminal", "kind"), [(True, StepProgress), (False, StepLines)])
def test_a_terminal_has_a_bar_and_a_file_has_lines(terminal, kind, monkeypatch):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal, write=print, flush=print))
    config = load_config([], ["student.path=a", "teacher.path=b", "diagnostics.print_every_n_steps=7"])
    (shown,) = [c for c in build_evaluation_trainer(config).callbacks if isinstance(c, StepProgress | StepLines)]
    assert isinstance(shown, kind)
    assert terminal or shown.every == 7
