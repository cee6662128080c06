"""What a CUDA device computes in which precision, and that it repeats itself where it is asked to."""

import os

import pytest
import torch

from lit_opd.config import Config, OptimConfig, load_config
from lit_opd.models import random_state, restore_random_state
from lit_opd.optim import StochasticAdamW
from lit_opd.runs import bench
from lit_opd.runs.prepare import prepare_data
from lit_opd.runs.torch_settings import settled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
DEVICE = "cuda"
# torch looks at it at the first product of the process, which a test of another file may make, and never again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
WORDS = ["data.batch_size=32", "data.train_size=32", "teacher.dtype=float32", "optim.paths=plain"]
ESTIMATORS = ["token", "sequence", "full_vocab", "teacher_topk"]


def step(name, accelerator, *words):
    """Sample and differentiate the first batch of the tiny pair: ids, loss and the gradient of all weights."""
    config = load_config(["conf/quickstart.yaml"], [*WORDS, f"estimator.name={name}", "estimator.kwargs={}", *words,
                                                    f"trainer.accelerator={accelerator}"])  # fmt: skip
    data = prepare_data(config, tell=False)
    module, arithmetic = bench.set_up(config, data)
    batch = module.transfer_batch_to_device(next(iter(data.train_dataloader())), module.device, 0)
    with arithmetic():
        rollout = module.distiller.sample(batch)
        tokens = rollout.mask_BT.sum().float()
        rows = torch.tensor(float(len(rollout)), device=module.device)
        loss = 0.0
        for micro in module.distiller.score(rollout):
            found = module.distiller.estimate(micro, module.distiller.weights(micro.rollout.mask_BT, tokens, rows))
            found.value.backward()
            loss += found.value.item()
    gradient = torch.cat([p.grad.flatten() for p in module.model.parameters()])
    return rollout.ids_BT.cpu(), loss, gradient.cpu()


def off(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_products_of_float32_are_float32_unless_the_key_says_tf32():
    torch.manual_seed(0)
    left, right = torch.randn(2, 1024, 1024, device=DEVICE)
    exact = left.double() @ right.double()
    own = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with settled(Config()):
            assert off(left @ right, exact) < 1e-5
        with settled(Config(optim=OptimConfig(tf32=True))):
            assert off(left @ right, exact) > 1e-5
    finally:
        torch.set_float32_matmul_precision(own)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_in_float32_is_that_of_a_cpu(name):
    (ids, loss, gradient), (own_ids, own_loss, own) = step(name, "gpu"), step(name, "cpu")
    assert torch.equal(ids, own_ids)
    print(f"{name}: loss off by {abs(loss / own_loss - 1):.1e}, gradient by {off(gradient, own):.1e}")
    assert loss == pytest.approx(own_loss, rel=1e-4, abs=1e-6)
    assert off(gradient, own) < 1e-4


@pytest.mark.parametrize("words", [[], ["teacher.dtype=bfloat16"], ["trainer.precision=bf16-mixed"]])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_deterministic_step_repeats_bit_for_bit(name, words):
    with settled(Config()):  # which puts back what the trainers set
        first, second = (step(name, "gpu", "trainer.deterministic=true", *words) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])


def test_dropout_goes_on_with_the_devices_own_random_state():
    device = torch.device(DEVICE)
    kept = random_state(device)
    expected = torch.rand(8, device=device)
    torch.rand(3, device=device)
    restore_random_state(kept)
    assert torch.equal(torch.rand(8, device=device), expected)


def test_steps_rounded_stochastically_count_in_the_mean_and_wait_for_nothing():
    weight = torch.nn.Parameter(torch.ones(2**14, dtype=torch.bfloat16, device=DEVICE))
    optimizer = StochasticAdamW([weight], lr=1e-4, weight_decay=0.0)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        for number in range(20):
            weight.grad = torch.ones_like(weight)
            torch.cuda.set_sync_debug_mode("error" if number else mode)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert weight.float().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)
