"""Tokens drawn in two readings, against the plain draw at the same uniform numbers."""

import pytest
import torch

from lit_opd.functional import sample_tokens
from lit_opd.types import SamplingLaw

draw_tokens = pytest.importorskip("lit_opd.kernels.token_draw", reason="it needs triton").draw_tokens

pytestmark = pytest.mark.usefixtures("interpreted")


def test_the_same_tokens_and_log_probabilities_as_the_plain_draw():
    torch.manual_seed(0)
    logits, uniforms = 3 * torch.randn(24, 5000), torch.rand(24, dtype=torch.float64)
    expected_ids, expected = sample_tokens(logits, SamplingLaw(temperature=0.5), uniforms)
    ids, logps = draw_tokens(logits, uniforms, factor=2.0)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_scale_soft_cap_and_temperature():
    torch.manual_seed(0)
    logits, uniforms = 40 * torch.randn(4, 300), torch.rand(4, dtype=torch.float64)
    ids, logps = draw_tokens(logits, uniforms, factor=2.0, softcap=5.0, scale=0.25)
    expected_ids, expected = sample_tokens(2 * 5 * (logits / 4 / 5).tanh(), SamplingLaw(), uniforms)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("only", [0, 2047, 2048, 4999])
def test_a_token_that_may_not_be_drawn_is_not(only, uniform):
    """Whole blocks may be excluded, and the ends of the interval of uniform numbers reach no such token."""
    logits = torch.full((1, 5000), -torch.inf)
    logits[0, only] = -3.0
    ids, logps = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64))
    assert ids.item() == only
    assert logps.item() == pytest.approx(0.0, abs=1e-6)


def test_improbable_tokens_are_drawn_as_often_as_their_share():
    """At the steps of the cumulative distribution itself, whose tail fp32 sums would lose."""
    torch.manual_seed(0)
    logits = 6 * torch.randn(4200)
    probabilities = logits.double().softmax(0)
    upto = probabilities.cumsum(0)
    tokens = torch.tensor([3, 1000, 2050, 4199])
    middle = upto[tokens] - probabilities[tokens] / 2
    ids, _ = draw_tokens(logits.expand(4, -1).contiguous(), middle)
    outside = (upto[ids] - probabilities[ids] / 2 - middle).abs() - probabilities[ids] / 2
    assert (outside < 1e-7).all()


def test_logits_that_are_no_numbers_name_some_token():
    ids, logps = draw_tokens(torch.full((1, 50), torch.nan), torch.tensor([0.5]).double())
    assert 0 <= ids.item() < 50
    assert logps.isnan().all()
