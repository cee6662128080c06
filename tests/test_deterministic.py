"""No operator of a step is one that CUDA refuses under `trainer.deterministic`."""

import pytest
import torch
from test_module import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd.measures.histogram import LogRatioHistogram

# What torch documents to raise on CUDA tensors under `torch.use_deterministic_algorithms(True)`, as far as it could
# serve here. Its documentation names `cumsum` too, which has a deterministic kernel since torch 2.6 (pull 140887).
REFUSED = {"histc", "put", "put_", "kthvalue", "nll_loss2d_forward", "ctc_loss", "_ctc_loss", "grid_sampler_2d"}


class AsOnCuda(TorchDispatchMode):
    """Refuses what a CUDA kernel refuses in deterministic mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        weighted = name == "bincount" and (len(args) > 1 and args[1] is not None or kwargs.get("weights") is not None)
        indexed = name in ("median", "nanmedian") and func._overloadname != "default"
        product = "scatter_reduce" in name and "prod" in (*args, *kwargs.values())
        if name in REFUSED or weighted or indexed or product:
            raise AssertionError(f"{func} has no deterministic kernel on CUDA")
        return func(*args, **kwargs)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def models(make_model):
    return make_model(1), make_model(2, hidden_size=24)


def gradients(module, batch):
    """Sample, score, estimate and differentiate, as a training step does."""
    distiller = module.assemble(lambda completion, row: float(len(completion) > 3))
    rollout = distiller.sample(batch)
    for micro in distiller.score(rollout, progress=0.5):
        weights_BT = distiller.weights(micro.rollout.mask_BT, torch.tensor(1.0), torch.tensor(1.0))
        distiller.estimate(micro, weights_BT).value.backward()
    return [p.grad for p in module.model.parameters()]


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=lambda v: str(v)[:60])
def test_a_step_of_every_estimator(name, kwargs, models, make_module, make_batch, deterministic):
    module = make_module(*models, name, estimator_kwargs=kwargs)
    with AsOnCuda():
        assert all(gradient is not None for gradient in gradients(module, make_batch()))


def test_what_is_drawn_under_a_truncated_law(models, make_module, make_batch, deterministic):
    rollout = {"top_p": 0.8, "top_k": 9, "min_p": 0.01, "min_new_tokens": 2, "temperature": 0.7}
    with AsOnCuda():
        assert gradients(make_module(*models, "token", rollout=rollout), make_batch())


def test_the_histogram_of_an_evaluation(deterministic):
    histogram = LogRatioHistogram()
    with AsOnCuda():
        histogram.update(torch.tensor([-0.5, 0.25, 0.25]))
    assert histogram.compute().totals.sum() == pytest.approx(1.0)
