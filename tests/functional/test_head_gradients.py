"""Sums of products, in one kernel or by parts, against float64."""

import pytest
import torch

from lit_opd.functional import Head, head_gradients, position_losses
from lit_opd.functional.head_gradients import add_product, adds_wide


def factors(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((11, 4), (11, 5), (5, 4))
    total, left, right = (torch.randn(shape, generator=generator) for shape in shapes)
    return total, left.to(dtype), right.to(dtype)


@pytest.fixture
def wide(monkeypatch):
    """The kernel of a CUDA device: it refuses what cuBLAS refuses, and adds in fp32."""
    calls = []

    def add(total, left, right):
        assert total.dtype == torch.float32
        assert left.dtype == right.dtype == torch.bfloat16
        calls.append(total.shape)
        total += left.float() @ right.float()

    monkeypatch.setattr(head_gradients, "_add_wide", add)
    monkeypatch.setattr(head_gradients, "adds_wide", lambda device, dtype: dtype == torch.bfloat16)
    return calls


@pytest.mark.parametrize("rows", [1, 3, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_by_parts(dtype, rows, monkeypatch):
    monkeypatch.setattr(head_gradients, "_ROWS", rows)
    total, left, right = factors(dtype)
    expected = total + (left @ right).float()
    add_product(total, left, right)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)


def test_a_product_that_is_added_at_once_is_not_rounded_before(wide):
    total, left, right = factors(torch.bfloat16)
    expected = total.double() + left.double() @ right.double()
    add_product(total, left, right)
    assert wide == [(11, 4)]
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


def test_both_gradients_of_a_head_are_added_at_once_where_that_is_possible(wide):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (6, 9))

    def loss(logits, part):
        return logits.logsumexp(-1).sum(), {}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = position_losses(hidden, Head(weight), loss, 4)
    found = torch.autograd.grad(value, (hidden, weight))
    assert wide == [(4, 4), (9, 4), (2, 4), (9, 4)]
    expected = torch.autograd.grad((hidden @ weight.T).logsumexp(-1).sum(), (hidden, weight))
    for gradient, reference in zip(found, expected, strict=True):
        assert (gradient - reference).norm() < 0.01 * reference.norm()


def test_a_cpu_adds_by_parts():
    assert not adds_wide(torch.device("cpu"), torch.bfloat16)
    assert not adds_wide(torch.device("cpu"), torch.float32)


def test_the_kernel_has_the_signature_that_it_is_called_with():
    """Without CUDA it is refused for its device, and for nothing else."""
    total, left, right = factors(torch.bfloat16)
    with pytest.raises(NotImplementedError, match="CPU"):
        head_gradients._add_wide(total, left, right)
