"""Nothing is computed below fp32."""

import pytest
import torch

from lit_opd.functional import log_softmax, upcast


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
    ids=str,
)  # fmt: skip
def test_at_least_fp32(given, expected):
    x = torch.tensor([1.0, 2.0], dtype=given)
    assert upcast(x).dtype == log_softmax(x).dtype == expected


def test_log_softmax_of_bf16_logits_is_that_of_the_raised_ones():
    logits = (5 * torch.randn(4, 100, generator=torch.Generator().manual_seed(0))).bfloat16()
    torch.testing.assert_close(log_softmax(logits).double(), logits.double().log_softmax(-1), rtol=0, atol=2e-6)


def test_gradient_comes_back_in_the_dtype_of_the_logits():
    logits = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    log_softmax(logits)[0].backward()
    assert logits.grad.dtype == torch.bfloat16


def test_upcast_copies_nothing_that_is_wide_enough():
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert upcast(x) is x
