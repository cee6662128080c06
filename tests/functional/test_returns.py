"""Returns against a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.functional import return_to_go


def by_loop(values, gamma):
    returns, following = [], 0.0
    for value in reversed(values):
        following = value + gamma * following
        returns.append(following)
    return returns[::-1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40).flatmap(lambda t: st.lists(st.lists(st.floats(-5, 5), min_size=t, max_size=t), min_size=1,
                                                     max_size=3)),
       st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])))  # fmt: skip
def test_equals_a_loop(rows, gamma):
    found = return_to_go(torch.tensor(rows, dtype=torch.float64), gamma)
    expected = torch.tensor([by_loop(row, gamma) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_the_discount_is_relative_to_the_position():
    """The last value is its own return whatever gamma: with gamma^i it would vanish."""
    assert return_to_go(torch.tensor([[1.0, 1.0, 8.0]]), 0.5).tolist() == [[3.5, 5.0, 8.0]]


def test_rows_do_not_mix_and_the_input_is_left_alone():
    values = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    before = values.clone()
    assert return_to_go(values, 1.0)[1].tolist() == [0.0, 0.0]
    assert torch.equal(values, before)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_refuses_a_gamma_that_is_no_discount(gamma):
    with pytest.raises(ValueError, match="gamma"):
        return_to_go(torch.zeros(1, 2), gamma)
