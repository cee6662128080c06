"""Whole runs that learn from a server: what a stop, a resume and other weights there do to them."""

import os
import signal
import threading
import time

import pytest
import torch
from teachers.teacher_servers import TeacherStandIn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_opd.cli import main
from lit_opd.config import PACKAGE_FOLDER

TEACHER, STUDENT = (str(PACKAGE_FOLDER / "tiny" / name) for name in ("teacher", "student"))
SHORT = (
    "trainer.max_steps=2", "evaluation.every_n_steps=2", "rollout.max_new_tokens=4", "data.validation_size=2",
    "tracking.system_metrics=false", "optim.warmup_steps=0", "estimator.name=token", "teacher.kind=served",
)  # fmt: skip


@pytest.fixture
def server():
    return TeacherStandIn(AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER))


def test_a_stop_ends_the_wait_for_a_server_within_seconds_and_loses_nothing(server, workspace, capsys, monkeypatch):
    """The signal comes as the second step begins, and from then on the server takes requests and answers none."""
    inner, kill, answers, sent = server.complete, os.kill, threading.Event(), []

    def send(*arguments):
        answers.clear()
        sent.append(time.monotonic())
        kill(*arguments)

    answers.set()
    server.lock = threading.Lock()
    monkeypatch.setattr(server, "complete", lambda body: (answers.wait(60), inner(body))[1])
    monkeypatch.setattr(os, "kill", send)
    stop = "callbacks=[{path: phases:At, kwargs: {where: step 1, number: 15}}]"
    with server.listening() as address:
        words = (*SHORT, f"teacher.server={address}")
        assert main(workspace.arguments("fit", *words, stop)) == 128 + signal.SIGTERM
        assert time.monotonic() - sent[0] < 10
        assert "Go on with --resume auto" in capsys.readouterr().err
        assert torch.load(workspace.checkpoint, weights_only=True)["global_step"] == 1
        answers.set()
        assert main(workspace.arguments("fit", *words, "--resume", "auto")) == 0
        found = torch.load(workspace.checkpoint, weights_only=True)
        assert main(workspace.arguments("fit", *words, "output_dir=whole")) == 0
    whole = torch.load(workspace.folder / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    assert found["global_step"] == whole["global_step"] == 2
    assert all(torch.equal(found["state_dict"][name], whole["state_dict"][name]) for name in whole["state_dict"])


def test_a_server_that_takes_shorter_rows_than_there_are_is_told_before_anything_is_written(server, workspace, capsys):
    server.context = 16
    with server.listening() as address:
        words = (*SHORT, "rollout.max_new_tokens=12", f"teacher.server={address}")
        for command in (["fit"], ["validate", "--untrained"]):
            assert main(workspace.arguments(*command, *words)) == 2
            assert "data.max_prompt_tokens: expected prompts of at most 3 tokens" in capsys.readouterr().err
    assert not workspace.output.exists()
