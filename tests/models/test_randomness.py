"""The random state that checkpoints hold."""

from types import SimpleNamespace

import pytest
import torch

from lit_opd.models import random_state, restore_random_state


@pytest.fixture
def accelerator(monkeypatch):
    """Gives torch an accelerator whose generator is one of the CPU."""
    generator, found = torch.Generator().manual_seed(7), SimpleNamespace(there=True)
    device = SimpleNamespace(
        get_rng_state=generator.get_state, set_rng_state=generator.set_state, is_available=lambda: found.there
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"cuda": device}[kind])
    found.draw = lambda: torch.rand(3, generator=generator).tolist()
    return found


def test_an_accelerators_generator_goes_on_where_it_was(accelerator):
    kept = random_state(torch.device("cuda:1"))
    expected = accelerator.draw(), torch.rand(3).tolist()
    accelerator.draw(), torch.rand(1)
    restore_random_state(kept)
    assert (accelerator.draw(), torch.rand(3).tolist()) == expected


def test_a_checkpoint_of_an_accelerator_is_read_where_there_is_none(accelerator):
    kept = random_state(torch.device("cuda:0"))
    drawn, accelerator.there = accelerator.draw(), False
    restore_random_state(kept)
    assert accelerator.draw() != drawn


def test_a_cpu_has_one_generator(accelerator):
    kept = random_state(torch.device("cpu"))
    expected = torch.rand(3).tolist()
    restore_random_state(kept)
    assert torch.rand(3).tolist() == expected
    assert list(kept) == ["torch_rng_state"]  # as checkpoints of earlier versions have it


def test_a_checkpoint_is_read_as_plain_values(accelerator, tmp_path):
    torch.save(random_state(torch.device("cuda:0")), tmp_path / "state")
    kept = torch.load(tmp_path / "state", weights_only=True)
    expected = accelerator.draw()
    restore_random_state(kept)
    assert accelerator.draw() == expected
