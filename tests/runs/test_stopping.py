"""Signals at every phase of a run: what is said, what is saved, how MLflow has it, and which exit code."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers

from lit_opd.cli import main

SHORT = ("trainer.max_steps=3", "evaluation.every_n_steps=2", "rollout.max_new_tokens=4", "data.validation_size=2",
         "tracking.system_metrics=false", "optim.warmup_steps=0")  # fmt: skip
MINE = """
import os
from lit_opd.data.arithmetic import is_correct, problems

def rows(number, **kwargs):
    os.kill(os.getpid(), number)
    return problems(**kwargs)
"""
NONE = "stopped by {}"
HOLDS = "holds the training so far. Go on with --resume auto."
SAVED = "Go on with --resume auto, or with"
# The phase, the signal, the line that is told, MLflow's status, and the step of the checkpoint.
PHASES = [
    ("data", "SIGHUP", NONE, None, None),
    ("validate teacher 0", "SIGTERM", NONE, "KILLED", None),
    ("validate student 0", "SIGINT", NONE, "KILLED", None),
    ("step 1", "SIGHUP", SAVED, "KILLED", 2),
    ("after 1", "SIGTERM", SAVED, "KILLED", 1),
    ("fit student 2", "SIGTERM", SAVED, "KILLED", 2),
    ("validate student 3", "SIGINT", SAVED, "KILLED", 3),
    ("export", "SIGTERM", HOLDS, "KILLED", 3),
    ("command validate --untrained", "SIGTERM", NONE, None, None),
    ("command export", "SIGINT", NONE, "FINISHED", 3),
]


@pytest.fixture
def sent(monkeypatch):
    """When each signal was sent: how long a run took before is not what is asked."""
    times = []

    def noting(send):
        return lambda *arguments: (times.append(time.monotonic()), send(*arguments))

    monkeypatch.setattr(os, "kill", noting(os.kill))
    monkeypatch.setattr(signal, "raise_signal", noting(signal.raise_signal))
    return times


@pytest.fixture
def stop_in_export(monkeypatch):
    def arrange(number):
        def save(*_, **__):
            signal.raise_signal(number)

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)

    return arrange


@pytest.mark.parametrize(("phase", "name", "said", "status", "step"), PHASES, ids=[phase[0] for phase in PHASES])
def test_a_signal_ends_every_phase_in_order(workspace, capsys, sent, stop_in_export, phase, name, said, status, step):
    number = int(signal.Signals[name])
    Path("mine.py").write_text(MINE)
    command = phase.removeprefix("command ").split() if phase.startswith("command") else ["fit"]
    words = [f"callbacks=[{{path: phases:At, kwargs: {{where: {phase}, number: {number}}}}}]"]
    if phase in ("data", "command validate --untrained"):
        words = ["data.path=mine.py:rows", f"data.kwargs.number={number}"]
    if phase == "command export":
        assert main(workspace.arguments("fit", *SHORT)) == 0
    if phase.endswith("export"):
        stop_in_export(number)
    capsys.readouterr()
    assert main(workspace.arguments(*command, *SHORT, *words)) == 128 + number
    assert time.monotonic() - sent[0] < 10
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (told,) = [line for line in err.splitlines() if "stopped by" in line or "Go on" in line]
    assert said.format(name) in told
    assert [run.info.status for run in workspace.runs] == ([status] if status else [])
    assert workspace.checkpoint.is_file() == (step is not None)
    if step is not None:
        assert torch.load(workspace.checkpoint, weights_only=True)["global_step"] == step
    if phase in ("after 1", "fit student 2"):  # the evaluation that was given up is made
        assert main(workspace.arguments("fit", *SHORT, "--resume", "auto")) == 0
        (run,) = workspace.runs
        assert run.info.status == "FINISHED"
        points = workspace.client.get_metric_history(run.info.run_id, "val/reverse_kl")
        assert [point.step for point in points] == [0, 2, 3]
        assert [p.step for p in workspace.client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
        assert json.loads((workspace.output / "summary.json").read_text())["steps"] == 3
