"""How often a training step makes the host wait for a CUDA device, by torch's own count."""

import warnings

import pytest
import torch

from lit_opd import DistillationModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]


def test_a_step_waits_about_two_dozen_times(make_module, make_model, fit, monkeypatch):
    """After the first steps, in which paths are proven and graphs captured: once in 16 tokens, and two dozen times."""
    counts, plain = [], DistillationModule.training_step

    def training_step(self, batch, batch_idx):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                plain(self, batch, batch_idx)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in told))

    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    module = make_module(make_model(1), make_model(2), rollout={"max_new_tokens": 33})
    fit(module, steps=4, accelerator="cuda", devices=1)
    print(f"waits in a step: {counts}")
    assert 0 < counts[-1] <= 34
