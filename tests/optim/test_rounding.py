"""Steps of weights in bfloat16: rounded stochastically, or lost and told."""

import io
import warnings

import pytest
import torch

from lit_opd.config import OptimConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.optim import StochasticAdamW, build_optimizer, rehearsal_device
from lit_opd.optim.rounding import round_stochastically

BF16 = torch.bfloat16


@pytest.mark.parametrize("value", [1 + 2**-9, -1.003, 3.1e-5, -7e30, 2**-133, 0.0, 1.0, float("inf")])
def test_the_mean_over_all_draws_is_the_value(value, monkeypatch):
    """Exactly: every draw there is, once."""
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: torch.arange(high, dtype=torch.int32))
    wide = torch.full((2**16,), value)
    rounded = round_stochastically(wide, torch.Generator())
    assert rounded.dtype == BF16
    assert len(rounded.unique()) == (1 if wide[0] == wide[0].bfloat16() else 2)
    assert rounded.double().mean() == wide[0].double()


def steps(weight, optimizer, number, start=0):
    for step in range(start, start + number):
        weight.grad = torch.sin(torch.arange(weight.numel()) + step).to(weight.dtype)
        optimizer.step()


def test_weights_in_float32_move_as_with_torchs_adamw():
    own, other = (torch.nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2))
    steps(own, StochasticAdamW([own], lr=0.01, weight_decay=0.1), 5)
    steps(other, torch.optim.AdamW([other], lr=0.01, weight_decay=0.1), 5)
    torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


def test_steps_that_rounding_would_lose_count_in_the_mean():
    own, lost = (torch.nn.Parameter(torch.ones(2**14, dtype=BF16)) for _ in range(2))
    for weight, kind in ((own, StochasticAdamW), (lost, torch.optim.AdamW)):
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert own.float().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)  # 5 standard errors
    assert torch.equal(lost, torch.ones_like(lost))


def test_a_resumed_optimizer_rounds_and_remembers_as_one_that_went_on():
    whole, part = (torch.nn.Parameter(torch.linspace(-1, 1, 256).to(BF16)) for _ in range(2))
    optimizer = StochasticAdamW([whole], lr=1e-3)
    steps(whole, optimizer, 6)
    first = StochasticAdamW([part], lr=1e-3)
    steps(part, first, 3)
    torch.save(first.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = StochasticAdamW([part], lr=1e-3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert {v.dtype for v in resumed.state[part].values() if isinstance(v, torch.Tensor)} == {torch.float32}
    steps(part, resumed, 3, start=3)
    assert torch.equal(whole, part)
    assert torch.equal(optimizer.state[whole]["exp_avg_sq"], resumed.state[part]["exp_avg_sq"])


def test_the_seed_names_the_draws():
    def after(seed):
        weight = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        steps(weight, StochasticAdamW([weight], lr=1e-3, seed=seed), 1)
        return weight

    assert torch.equal(after(0), after(0))
    assert not torch.equal(after(0), after(1))


@pytest.mark.parametrize("keys", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (0.9, 1.0)}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(keys):
    with pytest.raises(ValueError, match="below 0|not in"):
        StochasticAdamW([torch.nn.Parameter(torch.ones(1))], **keys)


def lost_steps(name="AdamW", lr=1e-6, dtype=BF16, warmup=0, number=1):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2**15).to(dtype))
    optimizer = build_optimizer(OptimConfig(name=name, lr=lr, warmup_steps=warmup), [weight])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        steps(weight, optimizer, number)
    return [str(one.message) for one in told if one.category is LintWarning]


def test_lost_steps_are_told_once_with_their_share():
    (told,) = lost_steps(number=3)
    assert told.startswith(
        "optim.lr: 100% of the weights with a gradient stayed where they were in step 1: rounding to "
    )
    assert "bfloat16 loses steps of a learning rate of 1e-06. Set student.dtype=float32 and " in told


def test_warm_up_is_waited_for():
    assert lost_steps(warmup=2, number=2) == []
    assert "in step 3" in lost_steps(warmup=2, number=4)[0]


@pytest.mark.parametrize("kept", [{"lr": 0.1}, {"dtype": torch.float32}, {"name": "StochasticAdamW"}])
def test_steps_that_are_kept_are_not_told(kept):
    assert lost_steps(**kept, number=2) == []


def test_weights_without_a_gradient_are_no_lost_steps():
    weight = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
    optimizer = build_optimizer(OptimConfig(lr=0.1, kwargs={"weight_decay": 0.0}), [weight])
    weight.grad = torch.zeros_like(weight)
    weight.grad[0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_an_optimizer_in_8_bits_by_name():
    bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50")  # the first with CPUs
    weight = torch.nn.Parameter(torch.randn(128, 64))
    optimizer = build_optimizer(OptimConfig(name="AdamW8bit", lr=1e-3), [weight])
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    torch.testing.assert_close(before - weight, torch.full_like(before, 1e-3), rtol=0.1, atol=5e-5)


def test_an_optimizer_in_8_bits_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'optim\.name: expected bitsandbytes, which has AdamW8bit.*quantization\]"'):
        build_optimizer(OptimConfig(name="AdamW8bit"), [torch.nn.Parameter(torch.ones(1))])


def test_an_optimizer_in_8_bits_is_tried_out_on_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert rehearsal_device(OptimConfig(name="AdamW8bit")).type == "meta"
    assert rehearsal_device(OptimConfig(name="bitsandbytes.optim:Lion8bit")).type == "meta"
    assert rehearsal_device(OptimConfig(name="AdamW")).type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert rehearsal_device(OptimConfig(name="AdamW8bit")).type == "cpu"


def test_a_misspelt_short_name_is_told():
    with pytest.raises(UserError, match="Did you mean 'StochasticAdamW'"):
        build_optimizer(OptimConfig(name="StochasticAdamw"), [torch.nn.Parameter(torch.ones(1))])
