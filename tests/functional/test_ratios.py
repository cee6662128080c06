"""Importance ratios against plain arithmetic; what is cut off; where the gradient goes."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_opd.functional import banded_ratio, importance_ratio, one_sided_ratio, truncated_ratio

logps = st.lists(st.tuples(st.floats(-18, 0), st.floats(-18, 0)), min_size=1, max_size=8)
fast = settings(max_examples=50, deadline=None)
RATIOS = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0])


def columns(pairs):
    return torch.tensor(pairs, dtype=torch.float64).unbind(-1)


@fast
@given(logps)
def test_the_ratio_is_that_of_the_probabilities(pairs):
    expected = torch.tensor([math.exp(p) / math.exp(mu) for p, mu in pairs], dtype=torch.float64)
    torch.testing.assert_close(importance_ratio(*columns(pairs)), expected, rtol=1e-12, atol=0)


def test_the_log_ratio_is_clamped_at_twenty_and_has_no_gradient_beyond():
    student = torch.tensor([-1.0, -70.0, -torch.inf, 0.0], requires_grad=True)
    ratio = importance_ratio(student, torch.tensor([-2.0, -1.0, -1.0, -90.0]))
    expected = torch.tensor([math.e, math.exp(-20), math.exp(-20), math.exp(20)])
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(ratio.sum(), student)
    torch.testing.assert_close(gradient, torch.tensor([math.e, 0.0, 0.0, 0.0]))


def test_bf16_is_raised_before_the_difference():
    """bf16 has no number between -10.0625 and -10: the difference would lose the sampler's share."""
    student, sampler = torch.tensor([-10.0625, -3.0]).bfloat16(), torch.tensor([-0.01, -3.0]).bfloat16()
    found = importance_ratio(student, sampler)
    assert found.dtype == one_sided_ratio(student, sampler).dtype == torch.float32
    torch.testing.assert_close(found[0].item(), math.exp(student[0].item() - sampler[0].item()), rtol=1e-5, atol=0)
    assert importance_ratio(student.double(), sampler).dtype == torch.float64


def test_truncation_caps_from_above_only():
    assert truncated_ratio(RATIOS, 2.0).tolist() == pytest.approx([0.1, 0.5, 1.0, 2.0, 2.0])


def test_the_band_holds_its_ends_and_drops_the_rest():
    assert banded_ratio(RATIOS, 0.5, 2.0).tolist() == [0.0, 0.5, 1.0, 2.0, 0.0]


@fast
@given(logps, st.floats(0, 1))
def test_the_one_sided_mask_drops_what_became_less_probable(pairs, max_drop):
    # At the very edge the last bit of an exponential decides, and libraries differ in it.
    assume(all(p == mu or abs(math.exp(mu) - math.exp(p) - max_drop) > 1e-12 for p, mu in pairs))

    def by_hand(p, mu):
        return 0.0 if math.exp(mu) - math.exp(p) > max_drop else math.exp(p - mu)

    expected = torch.tensor([by_hand(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(one_sided_ratio(*columns(pairs), max_drop), expected, rtol=1e-12, atol=0)


def test_by_default_a_drop_of_a_fifth_is_too_much_and_rare_tokens_stay():
    sampler = torch.tensor([0.9, 0.9, 0.1, 0.1]).log()
    student = torch.tensor([0.71, 0.69, 1e-4, 0.9]).log()
    assert (one_sided_ratio(student, sampler) > 0).tolist() == [True, False, True, True]


def test_callers_decide_whether_the_gradient_passes():
    student = torch.tensor([-0.5, -3.0], requires_grad=True)
    sampler = torch.tensor([-0.5, -0.1])
    ratio = importance_ratio(student, sampler)
    bounded = [ratio, truncated_ratio(ratio, 2.0), banded_ratio(ratio, 0.5, 2.0), one_sided_ratio(student, sampler)]
    slopes = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0].tolist() for x in bounded]
    small = math.exp(-2.9)
    assert slopes == [pytest.approx(x) for x in ([1.0, small], [1.0, small], [1.0, 0.0], [1.0, 0.0])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_ratio(RATIOS, 0.0), "cap must be positive, found 0.0"),
        (lambda: truncated_ratio(RATIOS, float("nan")), "cap must be positive, found nan"),
        (lambda: banded_ratio(RATIOS, 2.0, 1.0), "low and high must satisfy 0 <= low <= high, found 2.0 and 1.0"),
        (lambda: banded_ratio(RATIOS, -0.1, 1.0), "low and high must satisfy 0 <= low <= high, found -0.1 and 1.0"),
        (lambda: one_sided_ratio(RATIOS, RATIOS, 1.5), r"max_drop must lie in \[0, 1\], found 1.5"),
    ],
    ids=["no-cap", "nan-cap", "band-reversed", "band-negative", "drop"],
)
def test_bounds_that_are_none_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
