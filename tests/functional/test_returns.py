"""Returns and baselines against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.functional import k_step_return, leave_one_out_mean, remaining_mean, return_to_go

many = settings(max_examples=100, deadline=None)
rectangles = st.integers(0, 40).flatmap(
    lambda t: st.lists(st.lists(st.floats(-5, 5), min_size=t, max_size=t), min_size=1, max_size=3)
)
gammas = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))


def by_loop(values, gamma):
    returns, following = [], 0.0
    for value in reversed(values):
        following = value + gamma * following
        returns.append(following)
    return returns[::-1]


@many
@given(rectangles, gammas)
def test_equals_a_loop(rows, gamma):
    found = return_to_go(torch.tensor(rows, dtype=torch.float64), gamma)
    expected = torch.tensor([by_loop(row, gamma) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_the_discount_is_relative_to_the_position():
    """The last value is its own return whatever gamma: with gamma^i it would vanish."""
    assert return_to_go(torch.tensor([[1.0, 1.0, 8.0]]), 0.5).tolist() == [[3.5, 5.0, 8.0]]


def test_an_absolute_discount_is_another_objective():
    """Discounting by gamma^i from the start scales each return by gamma^t: late tokens hardly learn."""
    values, gamma = torch.tensor([[1.0, 1.0, 8.0]]), 0.5
    absolute = [sum(gamma**i * values[0, i].item() for i in range(t, 3)) for t in range(3)]
    assert absolute == [gamma**t * x for t, x in enumerate(return_to_go(values, gamma)[0].tolist())] == [3.5, 2.5, 2.0]


def test_rows_do_not_mix_and_the_input_is_left_alone():
    values = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    before = values.clone()
    assert return_to_go(values, 1.0)[1].tolist() == [0.0, 0.0]
    assert torch.equal(values, before)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_refuses_a_gamma_that_is_no_discount(gamma):
    with pytest.raises(ValueError, match="gamma"):
        return_to_go(torch.zeros(1, 2), gamma)


@many
@given(rectangles, gammas, st.integers(1, 50))
def test_k_steps_are_a_window_of_the_loop(rows, gamma, steps):
    found = k_step_return(torch.tensor(rows, dtype=torch.float64), steps, gamma)
    expected = [[by_loop(row[t : t + steps], gamma)[0] for t in range(len(row))] for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


def test_one_step_is_the_value_itself_and_all_steps_the_return_to_go():
    values = torch.randn(3, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(k_step_return(values, 1, 0.9), values)
    for steps in (17, 1000):
        torch.testing.assert_close(k_step_return(values, steps, 0.9), return_to_go(values, 0.9), rtol=0, atol=1e-13)
    torch.testing.assert_close(k_step_return(values, 5), k_step_return(values, 5, 1.0))


def test_small_values_before_a_large_one_keep_their_digits():
    """The difference of two suffix sums would return 0 here."""
    values = torch.tensor([[1e-3, 1e-3, 1e-3, 1e6]])
    assert k_step_return(values, 2)[0, 0].item() == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("steps", "gamma", "message"),
    [(0, 1.0, "steps must be at least 1, found 0"), (1, 1.5, r"gamma must lie in \[0, 1\], found 1.5")],
)
def test_refuses_a_window_without_steps_or_discount(steps, gamma, message):
    with pytest.raises(ValueError, match=message):
        k_step_return(torch.zeros(1, 2), steps, gamma)


@many
@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=0, max_size=30))
def test_the_remaining_mean_is_a_mean_over_what_is_counted(row):
    values, mask = [x for x, _ in row], [counted for _, counted in row]
    expected = []
    for t, (_, counted) in enumerate(row):
        remaining = [x for x, later in row[t:] if later]
        expected.append(sum(remaining) / len(remaining) if counted else 0.0)
    found = remaining_mean(torch.tensor([values], dtype=torch.float64), torch.tensor([mask], dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_remaining_mean_ignores_what_is_masked_whatever_it_is():
    values = torch.tensor([[1.0, torch.nan, 3.0, torch.inf]])
    found = remaining_mean(values, torch.tensor([[True, False, True, False]]))
    assert found.tolist() == [[2.0, 0.0, 3.0, 0.0]]
    assert remaining_mean(values.bfloat16(), torch.zeros(1, 4, dtype=torch.bool)).tolist() == [[0.0] * 4]


@many
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(-2, 3)), min_size=1, max_size=20))
def test_leave_one_out_is_the_mean_of_the_others(rows):
    groups = [g for *_, g in rows]
    expected = []
    for b, (*_, group) in enumerate(rows):
        others = [row[:2] for other, row in enumerate(rows) if row[2] == group and other != b]
        expected.append([sum(column) / len(others) for column in zip(*others, strict=True)] if others else [0.0, 0.0])
    values = torch.tensor([row[:2] for row in rows], dtype=torch.float64)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_mean(values, torch.tensor(groups)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        leave_one_out_mean(values[:, 0], torch.tensor(groups)), expected[:, 0], rtol=0, atol=1e-12
    )


def test_a_large_row_does_not_wash_out_the_others():
    """In fp32 (2e8 + 1 + 2) - 2e8 is 0."""
    values = torch.tensor([2e8, 1.0, 2.0])
    found = leave_one_out_mean(values, torch.zeros(3, dtype=torch.long))
    assert found.dtype == torch.float32
    assert found[0].item() == pytest.approx(1.5)
    assert leave_one_out_mean(values.bfloat16(), torch.zeros(3, dtype=torch.long)).dtype == torch.float32


def test_a_leave_one_out_baseline_does_not_depend_on_the_row_itself():
    values = torch.randn(6, 3, requires_grad=True)
    groups = torch.tensor([5, 5, 5, 1, 1, 9])
    for b in range(6):
        (slope,) = torch.autograd.grad(leave_one_out_mean(values, groups)[b].sum(), values)
        assert torch.equal(slope[b], torch.zeros(3))
        assert ((slope != 0).any(1) == ((groups == groups[b]) & (torch.arange(6) != b))).all()
