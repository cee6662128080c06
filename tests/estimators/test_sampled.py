"""Sampled-token estimators against formulas written out token by token."""

import math
from dataclasses import replace

import pytest
import torch

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trajectory_gradients, verify
from lit_opd.estimators.sampled import k3, log_ratio, score_function
from lit_opd.types import TokenBatch

MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = -2 * torch.rand(2, *MASK.shape, generator=generator, dtype=torch.float64) - 0.01
    return TokenBatch(student.to(dtype).requires_grad_(), teacher.to(dtype), student.detach().to(dtype), MASK)


def gradient(name, tokens, **keywords):
    loss = torch.where(tokens.mask_BT, build(name, **keywords)(tokens).loss_BT, 0.0).sum()
    return torch.autograd.grad(loss, tokens.student_logps_BT)[0]


def by_hand(tokens, coefficient):
    """coefficient(d) at counted tokens, in plain Python."""
    expected = torch.zeros_like(tokens.teacher_logps_BT)
    for b, t in tokens.mask_BT.nonzero().tolist():
        d = tokens.student_logps_BT[b, t].item() - tokens.teacher_logps_BT[b, t].item()
        expected[b, t] = coefficient(d)
    return expected


CASES = {
    "token": ({}, lambda d: d),
    "k2_loss": ({}, lambda d: d),
    "k3_loss": ({}, lambda d: 1 - math.exp(-d)),
    "clipped_log_ratio": ({"max_log_ratio": 0.4}, lambda d: max(-0.4, min(0.4, d))),
    "log_ratio_sign": ({}, lambda d: (d > 0) - (d < 0)),
    "fixed_advantage": ({"advantage": -0.3}, lambda d: 0.3 * (d > 0)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_is_the_formula_at_every_counted_token(name, seed):
    keywords, coefficient = CASES[name]
    tokens = batch(seed)
    torch.testing.assert_close(gradient(name, tokens, **keywords), by_hand(tokens, coefficient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("token", lambda d: d), ("k2_loss", lambda d: d * d / 2), ("k3_loss", lambda d: math.exp(-d) - 1 + d)],
)
def test_logged_kl_is_the_value_of_that_name(name, value):
    tokens = batch()
    found = torch.where(MASK, build(name)(tokens).kl_BT, 0.0)
    torch.testing.assert_close(found, by_hand(tokens, value), rtol=1e-12, atol=1e-12)


def test_what_is_clipped_is_the_credit_and_not_the_logged_kl():
    tokens = batch()
    assert torch.equal(build("clipped_log_ratio", max_log_ratio=0.1)(tokens).kl_BT, log_ratio(tokens).detach())


def test_k2_as_a_loss_has_the_gradient_of_the_score_function_for_every_sample():
    pair = TabularPair.random(4, 2, seed=3, stop=True)
    found, expected = (trajectory_gradients(pair, build(name))[1] for name in ("k2_loss", "token"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_k3_as_a_loss_is_not_the_reverse_kl_it_is_named_after():
    pair = TabularPair.random(4, 2, seed=3)
    assert verify(build("k3_loss"), pair, "forward_kl").is_unbiased
    assert verify(build("k3_loss"), pair, "reverse_kl").relative_bias > 0.1


@pytest.mark.parametrize("limit", [0.2, 1.0, 3.0])
def test_clipping_is_unbiased_exactly_where_no_log_ratio_reaches_the_limit(limit):
    pair = TabularPair.random(4, 2, seed=3)
    largest = (pair.student_logits_CV.log_softmax(-1) - pair.teacher_logits_CV.log_softmax(-1)).abs().max()
    verdict = verify(build("clipped_log_ratio", max_log_ratio=limit), pair)
    assert verdict.is_unbiased == (largest < limit)


def test_smaller_limits_have_more_bias_and_less_variance():
    pair = TabularPair.random(4, 2, seed=3)
    verdicts = [verify(build("clipped_log_ratio", max_log_ratio=limit), pair) for limit in (0.25, 0.5, 1.0, 2.0)]
    assert sorted(verdicts, key=lambda v: -v.relative_bias) == verdicts
    assert sorted(verdicts, key=lambda v: v.trace_variance) == verdicts


def test_score_function_stops_the_gradient_of_its_credit_and_ignores_masked_credit():
    tokens = batch()
    estimate = score_function(tokens, torch.where(MASK, 3 * log_ratio(tokens), torch.nan))
    (found,) = torch.autograd.grad(torch.where(MASK, estimate.loss_BT, 0.0).sum(), tokens.student_logps_BT)
    torch.testing.assert_close(found, by_hand(tokens, lambda d: 3 * d), rtol=1e-12, atol=1e-12)


def test_k3_keeps_its_digits_near_zero():
    d = torch.tensor([1e-4, -1e-4, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(k3(d), d.square() / 2 - d**3 / 6, rtol=1e-6, atol=1e-17)
    assert (k3(torch.linspace(-5, 5, 1001)) >= 0).all()


@pytest.mark.parametrize("name", CASES)
def test_extreme_log_ratios_are_finite_in_fp32(name):
    student = torch.tensor([[-60.0, -1e-6, -70.0]], requires_grad=True)
    teacher = torch.tensor([[-1e-6, -60.0, -70.0]])
    tokens = TokenBatch(student, teacher, student.detach(), torch.ones(1, 3, dtype=torch.bool))
    estimate = build(name, **CASES[name][0])(tokens)
    (found,) = torch.autograd.grad(estimate.loss_BT.sum(), student)
    assert estimate.loss_BT.isfinite().all()
    assert estimate.kl_BT.isfinite().all()
    assert found.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_a_completion_of_one_token_and_one_without_any(name):
    keywords, coefficient = CASES[name]
    student = torch.tensor([[-0.3], [-0.5]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-1.0], [-9.0]], dtype=torch.float64)
    tokens = TokenBatch(student, teacher, student.detach(), torch.tensor([[True], [False]]))
    expected = torch.tensor([[coefficient(0.7)], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient(name, tokens, **keywords), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(UserError, match="max_log_ratio must be positive and finite"):
        build("clipped_log_ratio", max_log_ratio=limit)


@pytest.mark.parametrize(("name", "factor"), [("log_ratio_sign", 2), ("fixed_advantage", 1)])
@pytest.mark.parametrize("stop", [False, True])
def test_without_its_size_the_log_ratio_follows_the_total_variation_distance(name, factor, stop):
    """TVD is the sum of p - q over the tokens with p > q, and half that of |p - q|."""
    pair = TabularPair.random(4, 3, seed=3, stop=stop)
    found, expected = expected_gradient(pair, build(name)), exact_gradient(pair, "tvd")
    torch.testing.assert_close(found, factor * expected, rtol=0, atol=1e-14)
    assert verify(build(name), pair, "reverse_kl").cosine < 0.95


def test_beside_the_teacher_the_sign_is_as_loud_as_far_from_it():
    """Norms of the expected gradients at a tenth and at a hundredth of the distance."""
    far = TabularPair.random(4, 1, seed=3)
    step_CV = far.teacher_logits_CV - far.student_logits_CV

    def norms(name):
        pairs = [replace(far, teacher_logits_CV=far.student_logits_CV + share * step_CV) for share in (0.1, 0.01)]
        return [float(expected_gradient(pair, build(name)).norm()) for pair in pairs]

    (louder, silent), (loud, as_loud) = norms("token"), norms("log_ratio_sign")
    assert silent < 0.2 * louder
    assert as_loud == pytest.approx(loud, rel=1e-12)


def test_the_same_advantage_at_all_tokens_trains_nothing():
    verdict = verify(build("fixed_advantage", where="all"), TabularPair.random(4, 3, seed=3, stop=True), "reverse_kl")
    assert verdict.dead
    assert verdict.ignores_teacher
    assert verdict.relative_bias == 1


@pytest.mark.parametrize("advantage", [0, 1.0, -math.inf, math.nan])
def test_an_advantage_that_is_not_negative_is_refused(advantage):
    with pytest.raises(UserError, match="advantage must be negative and finite"):
        build("fixed_advantage", advantage=advantage)


def test_tokens_that_nobody_chose_are_refused():
    with pytest.raises(UserError, match="where must be one of doubted, all, found 'both'"):
        build("fixed_advantage", where="both")


def test_token_is_the_local_reverse_kl_over_prefixes_that_the_student_writes():
    pair = TabularPair.random(3, 3, seed=4, stop=True)
    found = expected_gradient(pair, build("token"))
    torch.testing.assert_close(found, exact_gradient(pair, "reverse_kl"), rtol=0, atol=1e-14)
