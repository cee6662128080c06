"""Returns over later tokens, against double loops."""

import pytest
import torch

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, expected_gradient, trace_variance, trajectory_gradients, verify
from lit_opd.types import TokenBatch

MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = -2 * torch.rand(2, *MASK.shape, generator=generator, dtype=torch.float64)
    return TokenBatch(student.requires_grad_(), teacher, student.detach(), MASK)


def gradient(name, tokens, **keywords):
    loss = torch.where(tokens.mask_BT, build(name, **keywords)(tokens).loss_BT, 0.0).sum()
    return torch.autograd.grad(loss, tokens.student_logps_BT)[0]


def discounted(d, counted, t, gamma=1.0, steps=10**6):
    return sum(gamma ** (i - t) * d[i] for i in range(t, min(len(d), t + steps)) if counted[i])


def mean(d, counted, t):
    later = [d[i] for i in range(t, len(d)) if counted[i]]
    return sum(later) / len(later)


CASES = [
    ("sequence", {}, discounted),
    ("hybrid", {"gamma": 0.7}, lambda d, m, t: discounted(d, m, t, 0.7)),
    ("k_step", {"steps": 1}, lambda d, m, t: d[t]),
    ("k_step", {"steps": 3}, lambda d, m, t: discounted(d, m, t, steps=3)),
    ("k_step", {"steps": 2, "gamma": 0.5}, lambda d, m, t: discounted(d, m, t, 0.5, 2)),
    ("k_step", {"steps": 50}, discounted),
    ("length_normalised", {}, mean),
]


@pytest.mark.parametrize(("name", "keywords", "credit"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_credit_is_the_double_loop_and_skips_what_is_masked(name, keywords, credit, seed):
    tokens = batch(seed)
    expected = torch.zeros_like(tokens.teacher_logps_BT)
    d_BT = (tokens.student_logps_BT - tokens.teacher_logps_BT).tolist()
    for b, t in MASK.nonzero().tolist():
        expected[b, t] = credit(d_BT[b], MASK[b].tolist(), t)
    torch.testing.assert_close(gradient(name, tokens, **keywords), expected, **EXACT)


@pytest.fixture
def pair():
    return TabularPair.random(3, 4, seed=5, stop=True)


def test_k_step_goes_from_token_to_sequence(pair):
    for steps, name in ((1, "token"), (4, "sequence"), (100, "sequence")):
        found, expected = (trajectory_gradients(pair, e)[1] for e in (build("k_step", steps=steps), build(name)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_k_step_with_a_discount_and_the_whole_window_is_hybrid(pair):
    found = expected_gradient(pair, build("k_step", steps=4, gamma=0.6))
    torch.testing.assert_close(found, expected_gradient(pair, build("hybrid", gamma=0.6)), rtol=0, atol=1e-14)


def test_longer_windows_trade_variance_for_bias():
    pair = TabularPair.random(3, 4, seed=1)
    verdicts = [verify(build("k_step", steps=steps), pair, "sequence_reverse_kl") for steps in (1, 2, 3, 4)]
    assert sorted(verdicts, key=lambda v: -v.relative_bias) == verdicts
    assert sorted(verdicts, key=lambda v: v.trace_variance) == verdicts


def test_length_normalisation_has_less_variance_than_what_it_normalises(pair):
    assert trace_variance(pair, build("length_normalised")) < trace_variance(pair, build("sequence"))


@pytest.mark.parametrize(("name", "keywords", "_"), CASES)
def test_extreme_log_ratios_are_finite_in_fp32(name, keywords, _):
    student = torch.tensor([[-60.0, -1e-6, -60.0, -1e-6]], requires_grad=True)
    tokens = TokenBatch(student, student.detach().flip(1), student.detach(), torch.ones(1, 4, dtype=torch.bool))
    assert build(name, **keywords)(tokens).loss_BT.isfinite().all()
    assert gradient(name, tokens, **keywords).isfinite().all()


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_a_window_that_is_none_is_refused(steps):
    with pytest.raises(UserError, match="steps must be a whole number of at least 1"):
        build("k_step", steps=steps)


@pytest.mark.parametrize(("name", "keywords"), [("hybrid", {}), ("k_step", {"steps": 2})])
@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_discount_outside_zero_to_one_is_refused(name, keywords, gamma):
    with pytest.raises(UserError, match=r"gamma must lie in \[0, 1\]"):
        build(name, gamma=gamma, **keywords)


def test_contract_of_the_window():
    assert build("k_step", steps=1).contract[:2] == ("reverse_kl", True)
    assert build("k_step", steps=3).contract[:2] == ("sequence_reverse_kl", False)
