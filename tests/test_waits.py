"""A training step seldom makes the host wait for the device: counted on a CPU, by what would wait elsewhere."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd import DistillationModule

# Operations whose result, or whose shape, depends on values: an accelerator finishes its queue first.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "unique",
    "repeat_interleave.Tensor",
    "equal",
)
READS = ("tolist", "cpu", "numpy")


class Waits(TorchDispatchMode):
    """Counts, by name, what would make the host wait."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        indices = args[1] if name.startswith("index.") and len(args) > 1 else ()
        if name.startswith(WAITING) or any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counting(monkeypatch):
    """Counts in the steps of every module that is fitted, and gives the counts of each."""
    steps, plain = [], DistillationModule.training_step

    def training_step(self, batch, batch_idx):
        with Waits() as waits:
            for name in READS:
                monkeypatch.setattr(torch.Tensor, name, reading(name, waits.found))
            plain(self, batch, batch_idx)
        monkeypatch.undo()
        steps.append(waits.found)

    def reading(name, found):
        read = getattr(torch.Tensor, name)

        def run(self, *args, **keywords):
            found[name] += 1
            return read(self, *args, **keywords)

        return run

    DistillationModule.training_step = training_step
    yield steps
    DistillationModule.training_step = plain


@pytest.mark.parametrize(("estimator", "most"), [("full_vocab", 21), ("token", 22), ("sequence", 22)])
def test_a_step_waits_two_dozen_times(estimator, most, counting, make_module, make_model, fit):
    """For lengths, layouts, sums over processes and the norm, and not for prompts, rows, layers, chunks or tokens."""
    one = {"max_new_tokens": 1, "num_completions": 1}  # a CPU looks after every token who has ended, elsewhere seldom
    module = make_module(make_model(1), make_model(2), estimator, rollout=one, optim={"head_chunk_mib": 1})
    fit(module, steps=2)
    assert 0 < sum(counting[-1].values()) <= most, counting[-1]
