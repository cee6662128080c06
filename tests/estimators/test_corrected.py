"""Importance-corrected estimators: on fresh samples, on stale ones, and against plain Python."""

import math
from dataclasses import replace

import pytest
import torch

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.corrected import CORRECTIONS
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trajectory_gradients, verify
from lit_opd.types import TokenBatch

MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
CORRECTED = [("importance_k3", {}), ("ppo_reverse_kl", {}),
             *(("importance_reverse_kl", {"correction": name}) for name in CORRECTIONS)]  # fmt: skip
UNBIASED_WHEN_STALE = [("importance_k3", {}), ("importance_reverse_kl", {"correction": "full"})]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher, sampler = -2.5 * torch.rand(3, *MASK.shape, generator=generator, dtype=torch.float64)
    return TokenBatch(student.requires_grad_(), teacher, sampler, MASK)


def gradient(name, tokens, **keywords):
    loss = torch.where(tokens.mask_BT, build(name, **keywords)(tokens).loss_BT, 0.0).sum()
    return torch.autograd.grad(loss, tokens.student_logps_BT)[0]


def k3_coefficient(p, q, mu):
    d = math.log(p / q)
    return p / mu * (math.exp(-d) - 1 + d) + p / mu * (1 - math.exp(-d))


def weighted(weight):
    return lambda p, q, mu: weight(p, mu) * math.log(p / q)


def ppo_coefficient(p, q, mu, low=0.2, high=0.2, dual=3.0):
    """d/dlog p of the surrogate by cases: pushed while the ratio has not gone too far in the wanted direction."""
    advantage, ratio = -math.log(p / q), p / mu
    pushed = ratio < 1 + high if advantage > 0 else 1 - low < ratio < dual
    return -advantage * ratio if pushed else 0.0


CASES = [
    ("importance_k3", {}, k3_coefficient),
    ("importance_reverse_kl", {"correction": "full"}, weighted(lambda p, mu: p / mu)),
    ("importance_reverse_kl", {"correction": "truncated", "cap": 1.5}, weighted(lambda p, mu: min(p / mu, 1.5))),
    ("importance_reverse_kl", {"correction": "band"}, weighted(lambda p, mu: p / mu * (0.5 <= p / mu <= 2))),
    ("importance_reverse_kl", {"correction": "one_sided"}, weighted(lambda p, mu: p / mu * (mu - p <= 0.2))),
    ("ppo_reverse_kl", {}, ppo_coefficient),
    ("ppo_reverse_kl", {"clip_low": 0.5, "clip_high": 1.0, "dual_clip": 1.5},
     lambda p, q, mu: ppo_coefficient(p, q, mu, 0.5, 1.0, 1.5)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keywords", "coefficient"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_the_formula_at_every_counted_token(name, keywords, coefficient, seed):
    tokens = batch(seed)
    expected = torch.zeros_like(tokens.teacher_logps_BT)
    for b, t in MASK.nonzero().tolist():
        logps = (tokens.student_logps_BT, tokens.teacher_logps_BT, tokens.sampler_logps_BT)
        expected[b, t] = coefficient(*(math.exp(x[b, t].item()) for x in logps))
    torch.testing.assert_close(gradient(name, tokens, **keywords), expected, **EXACT)


def test_the_formulas_are_tried_on_both_sides_of_every_bound():
    ratios = torch.cat([(t.student_logps_BT.detach() - t.sampler_logps_BT)[MASK] for t in map(batch, range(4))]).exp()
    for bound in (0.5, 0.8, 1.2, 1.5, 2.0, 3.0):
        assert (ratios < bound).any()
        assert (ratios > bound).any()


@pytest.mark.parametrize(("name", "keywords"), CORRECTED)
def test_on_fresh_samples_all_are_the_token_estimator(name, keywords):
    pair = TabularPair.random(4, 3, seed=2, stop=True)
    found, expected = (trajectory_gradients(pair, e)[1] for e in (build(name, **keywords), build("token")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.fixture(params=[(False, 0.5), (True, 0.5), (True, 1.5)], ids=["fixed-length", "with-stop-token", "very-stale"])
def stale(request):
    stop, shift = request.param
    return TabularPair.random(4, 3, seed=6, stop=stop).with_sampler(shift)


@pytest.mark.parametrize(("name", "keywords"), UNBIASED_WHEN_STALE)
def test_the_full_ratio_gives_the_local_reverse_kl_at_the_samplers_prefixes(name, keywords, stale):
    found = expected_gradient(stale, build(name, **keywords))
    torch.testing.assert_close(found, exact_gradient(stale, "reverse_kl"), rtol=0, atol=1e-13)


def test_the_full_ratio_does_not_correct_how_often_a_prefix_is_written(stale):
    fresh = replace(stale, sampler_logits_CV=None)
    found = expected_gradient(stale, build("importance_reverse_kl", correction="full"))
    assert (found - exact_gradient(fresh, "reverse_kl")).norm() > 1e-2


BIASED_WHEN_STALE = [
    ("token", {}),
    ("importance_reverse_kl", {"correction": "truncated", "cap": 1.2}),
    ("importance_reverse_kl", {"correction": "band"}),
    ("importance_reverse_kl", {"correction": "one_sided", "max_drop": 0.05}),
    ("ppo_reverse_kl", {}),
]


@pytest.mark.parametrize(("name", "keywords"), BIASED_WHEN_STALE)
def test_bounded_and_absent_weights_are_biased_on_stale_samples(name, keywords, stale):
    assert verify(build(name, **keywords), stale, "reverse_kl").relative_bias > 1e-3


def test_truncation_bounds_the_variance_of_very_stale_samples():
    stale = TabularPair.random(4, 3, seed=6).with_sampler(1.5)
    full, truncated = (
        verify(build("importance_reverse_kl", correction=name, cap=1.2), stale, "reverse_kl")
        for name in ("full", "truncated")
    )
    assert full.is_unbiased
    assert truncated.trace_variance < full.trace_variance


def test_bounds_that_no_ratio_reaches_leave_the_full_ratio():
    tokens = batch()
    loose = {"cap": 1e9, "low": 0.0, "high": 1e9, "max_drop": 1.0}
    expected = gradient("importance_reverse_kl", tokens, correction="full")
    for name in CORRECTIONS:
        assert torch.equal(gradient("importance_reverse_kl", tokens, correction=name, **loose), expected)


@pytest.mark.parametrize(("name", "keywords"), CORRECTED)
@pytest.mark.parametrize("sampler", [-1e-6, -60.0])
def test_extreme_ratios_are_finite_in_fp32(name, keywords, sampler):
    student = torch.tensor([[-60.0, -1e-6, -60.0, -1e-6]], requires_grad=True)
    teacher = torch.tensor([[-1e-6, -60.0, -60.0, -1e-6]])
    tokens = TokenBatch(student, teacher, torch.full((1, 4), sampler), torch.ones(1, 4, dtype=torch.bool))
    estimate = build(name, **keywords)(tokens)
    (found,) = torch.autograd.grad(estimate.loss_BT.sum(), student)
    assert estimate.loss_BT.isfinite().all()
    assert estimate.kl_BT.isfinite().all()
    assert found.isfinite().all()


@pytest.mark.parametrize(("name", "keywords"), CORRECTED)
def test_contracts_say_that_they_correct(name, keywords):
    estimator = build(name, **keywords)
    assert estimator.spec.corrects
    assert estimator.contract[:2] == ("reverse_kl", True)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"correction": "tis"}, "correction must be one of full, truncated, band, one_sided, found 'tis'"),
        ({"cap": 0.9}, "cap must be at least 1"),
        ({"cap": math.nan}, "cap must be at least 1"),
        ({"low": 1.0}, "low and high must satisfy 0 <= low < 1 < high"),
        ({"low": -0.1}, "low and high must satisfy 0 <= low < 1 < high"),
        ({"high": 1.0}, "low and high must satisfy 0 <= low < 1 < high"),
        ({"max_drop": 0.0}, r"max_drop must lie in \(0, 1\]"),
        ({"max_drop": 1.1}, r"max_drop must lie in \(0, 1\]"),
    ],
)
def test_corrections_that_cannot_work_are_refused(keywords, message):
    with pytest.raises(UserError, match=message):
        build("importance_reverse_kl", **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"clip_low": 0.0}, r"clip_low must lie in \(0, 1\]"),
        ({"clip_low": 1.1}, r"clip_low must lie in \(0, 1\]"),
        ({"clip_high": 0.0}, "clip_high must be positive"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
    ],
)
def test_clips_that_cannot_work_are_refused(keywords, message):
    with pytest.raises(UserError, match=message):
        build("ppo_reverse_kl", **keywords)
