"""The label of weights: new with whatever changes them, and the same wherever they are the same."""

import copy
import inspect
import signal
import subprocess
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

from lit_opd.config import OptimConfig
from lit_opd.optim import build_optimizer
from lit_opd.optim.building import UNUSABLE
from lit_opd.rollout.weights import WeightSync, weights_label

OPTIMIZERS = [
    (name, {way: True} if way else {})
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in UNUSABLE
    for way in ("", "fused", "foreach")
    if not way or way in inspect.signature(cls.__init__).parameters
]


def make_layer(seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(4, 3, bias=False, **kwargs)


def test_every_optimizer_of_torch_is_among_them():
    assert {name for name, _ in OPTIMIZERS} >= {"AdamW", "Adafactor", "Muon", "SGD", "Rprop", "ASGD"}
    assert ("AdamW", {"fused": True}) in OPTIMIZERS


@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS, ids=lambda value: "-".join(value) if value else "")
def test_a_step_of_any_optimizer_makes_a_new_label(name, kwargs):
    layer = make_layer()
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1, kwargs=kwargs), layer.parameters())
    labels = [weights_label(layer)]
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 4)).square().sum().backward()
        assert weights_label(layer) == labels[-1]  # gradients are no weights
        optimizer.step()
        labels.append(weights_label(layer))
    assert len(set(labels)) == 4


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(make_layer(1).state_dict()),
    "assign": lambda model: model.load_state_dict(make_layer(1).state_dict(), assign=True),
    "data": lambda model: model.weight.data.mul_(-1),
    "new_data": lambda model: setattr(model.weight, "data", torch.ones(3, 4)),
    "bits": lambda model: model.weight.data[0, :1].copy_(torch.nextafter(model.weight[0, :1], torch.ones(1))),
    "dtype": lambda model: model.to(torch.bfloat16),
    "name": lambda model: model.register_buffer("scale", torch.ones(2)),
    "inference": lambda model: setattr(model, "weight", inference_parameter()),
}


def inference_parameter():
    with torch.inference_mode():
        return nn.Parameter(torch.ones(3, 4), requires_grad=False)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_the_weights_makes_a_new_label(change):
    layer = make_layer()
    before = weights_label(layer)
    change(layer)
    assert weights_label(layer) != before


def test_the_same_weights_have_the_same_label_wherever_they_lie():
    layer = make_layer()
    label, other = weights_label(layer), make_layer(1)
    other.load_state_dict(layer.state_dict())
    assert weights_label(other) == label
    layer.weight.data = layer.weight.data.t().contiguous().t()
    assert weights_label(layer.eval().requires_grad_(False)) == label


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_tensors_of_any_size_and_place_count(dtype):
    for size, start in ((0, 0), (1, 0), (3, 1), (8, 0), (8, 3), (7, 2)):
        layer, whole = make_layer(), torch.zeros(12, dtype=dtype)
        layer.register_buffer("part", whole[start : start + size])
        labels = [weights_label(layer)]
        for place in range(start, start + size):
            whole[place] = 1
            labels.append(weights_label(layer))
        assert len(set(labels)) == size + 1
    layer.part = whole[3]  # a number without dimensions
    before = weights_label(layer)
    whole[3] = 0
    assert weights_label(layer) != before


def test_adapters_count(make_model):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(make_model(), lora)
    before = weights_label(adapted)
    optimizer = build_optimizer(OptimConfig(name="AdamW", lr=0.1), adapted.parameters())
    adapted(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    optimizer.step()
    assert weights_label(adapted) != before


def test_two_processes_agree(tmp_path, warm_python):
    """As those of a data-parallel run do that share a server, and as a run that is resumed does with itself."""
    layer = make_layer()
    save_model(layer, str(tmp_path / "weights"))
    code = """if True:
        import sys
        from safetensors.torch import load_model
        from torch import nn
        from lit_opd.rollout.weights import weights_label
        layer = nn.Linear(4, 3, bias=False)
        load_model(layer, sys.argv[1])
        print(weights_label(layer))
    """
    command = [warm_python, "-c", code, str(tmp_path / "weights")]
    assert subprocess.check_output(command, text=True).strip() == weights_label(layer)


def test_weights_are_written_only_where_the_engine_has_others():
    engine = {"label": "its own", "loads": 0}

    def load(folder, label):
        engine.update(label=label, loads=engine["loads"] + 1, weights=load_file(f"{folder}/model.safetensors"))

    layer = make_layer()
    layer.config = None  # nothing to rename: no model of the hub
    sync = WeightSync("an engine", lambda: engine["label"], load)
    assert sync.push(layer, torch.bfloat16) == sync.push(copy.deepcopy(layer), torch.bfloat16) == engine["label"]
    assert engine["loads"] == 1
    assert torch.equal(engine["weights"]["weight"], layer.weight.bfloat16())
    layer.weight.data.mul_(2)
    sync.push(layer, torch.bfloat16)
    assert engine["loads"] == 2
    engine["label"] = "another run's"
    assert sync.push(layer, None) == engine["label"]
    assert engine["loads"] == 3
    assert engine["weights"]["weight"].dtype == torch.float32


def test_what_was_written_is_gone_where_the_process_was_killed(warm_python):
    code = """if True:
        import os, signal
        from lit_opd.rollout.weights import passing_folder
        with passing_folder() as folder:
            open(f"{folder}/model.safetensors", "w").close()
            print(folder, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([warm_python, "-c", code], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while Path(killed.stdout.strip()).exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout.strip()
    assert not Path(killed.stdout.strip()).exists()
