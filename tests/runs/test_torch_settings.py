"""The precision of float32 products in a run, and what a run leaves of torch's global choices."""

import os
import subprocess
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lit_opd.config import Config, OptimConfig, StudentConfig, TeacherConfig
from lit_opd.runs import distillation, torch_settings


def of(tf32=False):
    return Config(optim=OptimConfig(tf32=tf32), student=StudentConfig("s"), teacher=TeacherConfig(path="t"))


def choices():
    """What torch would do now: float32 products on CUDA, convolutions there, products on a CPU."""
    backends = torch.backends
    return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


@pytest.fixture
def own_choices():
    """Put back what a test chooses for the process."""
    with torch_settings.settled(of()):
        yield


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_what_the_key_says_and_then_what_they_were(before, tf32, own_choices):
    torch.set_float32_matmul_precision(before)
    own = choices()
    with torch_settings.settled(of(tf32)):
        assert choices() == (("high", True, True) if tf32 else ("highest", False, False))
    assert choices() == own


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch keeps one choice an operation from 2.9"
)
def test_choices_that_contradict_each_other_are_settled_and_put_back(own_choices):
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        torch.get_float32_matmul_precision()
    with torch_settings.settled(of()):
        assert choices() == ("highest", False, False)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


PROBE = """
import torch
from lit_opd.config import Config
from lit_opd.runs import torch_settings
print(torch.get_float32_matmul_precision())
with torch_settings.settled(Config()):
    print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
print(torch.get_float32_matmul_precision())
"""


def test_an_environment_that_switches_tf32_on_does_not_reach_a_run():
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    ran = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["high", "highest", "False", "high"]


@pytest.mark.parametrize("call", ["train", "evaluate"])
def test_a_run_leaves_no_global_choice_behind(call, monkeypatch, own_choices):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # which a trainer of another test may have left
    torch.set_float32_matmul_precision("high")
    own, inside = choices(), []

    def work(*_):
        L.Trainer(deterministic=True, logger=False, enable_checkpointing=False, accelerator="cpu")
        inside.append(
            (choices(), torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ)
        )
        raise RuntimeError("the end")

    monkeypatch.setattr(distillation, f"_{call}", work)
    with pytest.raises(RuntimeError, match="the end"):
        getattr(distillation, call)(of(), *(("x", "test") if call == "evaluate" else ()))
    assert inside == [(("highest", False, False), True, True)]
    assert choices() == own
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def trainer_on(device, first=True):
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, is_global_zero=first, precision="32-true")


def test_an_accelerator_is_told_what_runs_in_which_precision(caplog):
    torch_settings.tell(of(), trainer_on("cuda:0"))
    assert caplog.messages == [
        "On cuda:0: student float32, trainer.precision 32-true; products of float32 in float32, without TF32; "
        "teacher bfloat16."
    ]
    torch_settings.tell(of(tf32=True), trainer_on("cuda:0"))
    assert "products of float32 in TF32 (optim.tf32=true)" in caplog.messages[1]


def test_a_cpu_and_further_processes_are_silent(caplog):
    torch_settings.tell(of(), trainer_on("cpu"))
    torch_settings.tell(of(), trainer_on("cuda:1", first=False))
    assert caplog.messages == []
