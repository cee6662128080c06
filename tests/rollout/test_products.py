"""Products over weights laid out once, against `linear`."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd.rollout.products import make_product

ROWS = [1, 8, 33]


class Calls(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operands(rows, dtype, with_bias, inputs=48, outputs=40):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (rows, outputs))
    return x, weight, torch.randn(outputs, generator=generator).to(dtype) if with_bias else None


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", ROWS)
def test_in_fp32_a_product_is_linear_exactly(rows, dtype, with_bias):
    x, weight, bias = operands(rows, dtype, with_bias)
    assert torch.equal(make_product(weight, bias, rows)(x), linear(x, weight, bias))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_in_bf16_a_product_is_linear_up_to_one_rounding(rows, with_bias):
    """Also for another number of rows than it was made for."""
    _, weight, bias = operands(rows, torch.bfloat16, with_bias)
    product = make_product(weight, bias, 8)
    x = operands(rows, torch.bfloat16, with_bias)[0]
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = product(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    # Half a unit in the last of eight bits, and what sums in fp32 add where terms cancel.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


def test_on_a_cpu_in_bf16_the_packed_operation_runs():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    for dtype, packed in ((torch.bfloat16, True), (torch.float32, False)):
        x, weight, bias = operands(8, dtype, with_bias=True)
        product = make_product(weight, bias, 8)
        with Calls() as calls:
            product(x)
        assert any("_linear_pointwise" in name for name in calls.names) == packed
        assert not packed or calls.names == ["mkldnn._linear_pointwise.default"], "the weight was laid out again"


def test_without_onednn_it_is_linear(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight, bias = operands(8, torch.bfloat16, with_bias=True)
    with Calls() as calls:
        found = make_product(weight, bias, 8)(x)
    assert not any("mkldnn" in name for name in calls.names)
    assert torch.equal(found, linear(x, weight, bias))
