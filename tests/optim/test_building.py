"""Optimizers and schedules by name."""

import math
import re
import warnings

import pytest
import torch

from lit_opd.config import OptimConfig
from lit_opd.errors import UserError
from lit_opd.optim import build_optimizer, build_scheduler, outer_matrices
from lit_opd.optim.building import UNUSABLE
from lit_opd.runs.prepare import check_optimizer


def rates(steps=8, **keys):
    """Learning rates of the first steps; any warning is an error."""
    weight = torch.nn.Parameter(torch.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = OptimConfig(name="SGD", lr=2.0, **keys)
        optimizer = build_optimizer(config, [weight])
        scheduler = build_scheduler(config, optimizer)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            weight.grad = torch.ones(2)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return found


def test_warm_up_begins_above_zero_and_hands_over_to_the_schedule():
    cosine = [1 + math.cos(math.pi * t / 10) for t in range(4)]
    found = rates(scheduler="CosineAnnealingLR", scheduler_kwargs={"T_max": 10}, warmup_steps=4)
    assert found == pytest.approx([0.4, 0.8, 1.2, 1.6, *cosine])


def test_warm_up_alone_schedule_alone_and_neither():
    assert rates(5, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates(3, scheduler="ExponentialLR", scheduler_kwargs={"gamma": 0.5}) == pytest.approx([2.0, 1.0, 0.5])
    assert rates(3) == [2.0, 2.0, 2.0]


def test_only_trainable_parameters_are_optimized():
    frozen, free = torch.nn.Parameter(torch.zeros(1), requires_grad=False), torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer(OptimConfig(name="AdamW", lr=0.1, kwargs={"weight_decay": 0.3}), [frozen, free])
    assert [p is free for g in optimizer.param_groups for p in g["params"]] == [True]
    assert optimizer.defaults["weight_decay"] == 0.3
    with pytest.raises(UserError, match=r"student: expected trainable parameters"):
        build_optimizer(OptimConfig(), [frozen])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "AdmaW"}, r"optim\.name: .*Did you mean 'AdamW'"),
        ({"name": "adamw"}, r"optim\.name: .*Did you mean 'AdamW'"),
        ({"name": "torch.nn:Linear"}, r"optim\.name: expected a class of torch.optim.optimizer.Optimizer"),
        ({"name": "torch.optim:Adamw"}, r"optim\.name: .*Did you mean 'AdamW'"),
        ({"name": "LBFGS"}, r"optim\.name"),
        ({"name": "Optimizer"}, r"optim\.name"),
        ({"kwargs": {"momentum": 1}}, r"optim\.kwargs: expected keywords of torch\.optim\.AdamW"),
        ({"kwargs": {"weight_decay": -1}}, r"optim\.kwargs: .*weight_decay"),
        ({"scheduler": "CosineAnealingLR"}, r"optim\.scheduler: .*Did you mean 'CosineAnnealingLR'"),
        ({"scheduler": "ReduceLROnPlateau"}, r"optim\.scheduler"),
        ({"scheduler": "CosineAnnealingLR"}, r"optim\.scheduler_kwargs: .*T_max"),
    ],
)
def test_mistakes_are_told(keys, message):
    config = OptimConfig(**keys)
    with pytest.raises(UserError, match=message):
        build_scheduler(config, build_optimizer(config, [torch.nn.Parameter(torch.zeros(2))]))


def test_an_optimizer_and_a_scheduler_by_path():
    config = OptimConfig(name="torch.optim.adamw:AdamW", scheduler="torch.optim.lr_scheduler:ConstantLR")
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert type(build_scheduler(config, optimizer)) is torch.optim.lr_scheduler.ConstantLR


@pytest.mark.parametrize(
    ("name", "kwargs", "fused"),
    [("AdamW", {}, True), ("SGD", {}, True), ("AdamW", {"fused": False}, False), ("AdamW", {"foreach": True}, None),
     ("RMSprop", {}, None)],
)  # fmt: skip
def test_an_optimizer_is_fused_where_it_can_be_and_nobody_chose(name, kwargs, fused):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(OptimConfig(name=name, kwargs=kwargs), [weight])
    assert optimizer.param_groups[0].get("fused") is fused


def test_a_fused_step_is_the_plain_one():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64)) for _ in range(2)]
    for weight, kwargs in zip(weights, ({}, {"fused": False}), strict=True):
        optimizer = build_optimizer(OptimConfig(lr=0.1, kwargs={"weight_decay": 0.1, **kwargs}), [weight])
        for step in range(3):
            weight.grad = torch.sin(weight.detach() + step)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


def optimizers_of(module, prefix=""):
    kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    return [prefix + name for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)]


@pytest.mark.parametrize("name", sorted(optimizers_of(torch.optim)))
def test_every_optimizer_of_torch_trains_a_step_or_is_refused(name):
    refused_or_trains(name, refused=name in UNUSABLE)


def test_every_optimizer_of_bitsandbytes_trains_a_step_or_is_refused(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50")  # the first with CPUs
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    found = optimizers_of(bitsandbytes.optim, "bitsandbytes.optim:")
    assert len(found) > 30
    for name in found:
        # The former two fail on a CPU (0.50), the others have no step without momentum.
        refused_or_trains(name, refused=re.search("AdEMAMix32bit|SGD|LARS", name))
        if "SGD" in name or "LARS" in name:
            refused_or_trains(name, refused=False, kwargs={"momentum": 0.9})


def refused_or_trains(name, refused, **keys):
    """Before any weights load it is refused in one line, or it makes a finite step of every weight."""
    config = OptimConfig(name=name, lr=0.01, **keys)
    if refused:
        with pytest.raises(UserError, match=r"^optim(\.name)?: expected ") as error:
            check_optimizer(config)
        assert "\n" not in str(error.value)
        return
    check_optimizer(config)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 64), torch.nn.Linear(64, 70))
    optimizer = build_optimizer(config, model.parameters(), outer_matrices(model))
    before = [weight.detach().clone() for weight in model.parameters()]
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all(), name
        assert not torch.equal(old, new), name


def test_an_optimizer_of_ones_own_by_its_file(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\nclass Half(torch.optim.SGD):\n    pass\n")
    config = OptimConfig(name=f"{tmp_path / 'mine.py'}:Half")
    check_optimizer(config)
    assert type(build_optimizer(config, [torch.nn.Parameter(torch.zeros(2))])).__name__ == "Half"
