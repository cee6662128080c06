"""Intervals against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.measures.intervals import (
    Interval,
    over_prompts,
    pass_at_k,
    prompt_moments,
    ratio_interval,
    wilson_over_prompts,
)

fast = settings(max_examples=60, deadline=None)


@fast
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.floats(0.5, 0.99))
def test_with_equal_weights_it_is_student_s_interval_of_the_mean(values, confidence):
    found = over_prompts(values, [1.0] * len(values), confidence)
    mean, error = np.mean(values), scipy.stats.sem(values)
    if error < 1e-6:  # the interval is a point, up to the rounding of sums of squares
        assert found == pytest.approx((mean,) * 3, abs=1e-3)
    else:
        low, high = scipy.stats.t.interval(confidence, len(values) - 1, mean, error)
        assert found == pytest.approx((mean, low, high), rel=1e-6, abs=1e-6)


def test_with_unequal_weights_it_is_the_ratio_estimator_s_interval():
    sums, weights = np.array([3.0, 10.0, 1.0, 7.0]), np.array([2.0, 5.0, 2.0, 3.0])
    found = over_prompts(sums.tolist(), weights.tolist())
    mean = sums.sum() / weights.sum()
    residuals = sums - mean * weights
    error = math.sqrt(4 / 3 * (residuals**2).sum()) / weights.sum()
    half = scipy.stats.t.ppf(0.975, 3) * error
    assert found == pytest.approx((mean, mean - half, mean + half), rel=1e-12)


def test_the_interval_covers_where_completions_of_a_prompt_agree():
    """300 sets of 60 prompts whose completions share an effect; the interval takes the prompt as the unit."""
    generator = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(300):
        counts = generator.integers(1, 9, 60)
        effects = generator.normal(1.0, 1.0, 60)
        values = [effect + generator.normal(0, 0.3, n) for effect, n in zip(effects, counts, strict=True)]
        found = over_prompts([float(v.sum()) for v in values], counts.astype(float).tolist())
        covered += found.low <= 1.0 <= found.high
        pooled = np.concatenate(values)
        low, high = scipy.stats.t.interval(0.95, len(pooled) - 1, pooled.mean(), scipy.stats.sem(pooled))
        naive += low <= 1.0 <= high
    assert 0.92 <= covered / 300 <= 0.98
    assert naive / 300 < 0.75, "the simulation does not tell the two apart"


def test_nothing_and_one_prompt():
    for mean in (over_prompts, wilson_over_prompts):
        assert all(map(math.isnan, mean([], [])))
        assert all(map(math.isnan, mean([0.0, 0.0], [0.0, 0.0])))
    assert over_prompts([6.0], [4.0]) == Interval(1.5, -math.inf, math.inf)
    assert over_prompts([6.0, 0.0], [4.0, 0.0]) == Interval(1.5, -math.inf, math.inf), "no token, nothing said"


def test_moments_of_parts_add_up_and_every_column_has_its_own_interval():
    sums, weights = torch.rand(2, 5, 3, dtype=torch.float64), torch.randint(1, 9, (5, 3))
    parts = prompt_moments(sums[:, :2], weights[:2], dim=1) + prompt_moments(sums[:, 2:], weights[2:], dim=1)
    means, lows, highs = ratio_interval(parts.numpy())
    assert means.shape == (2, 3)
    for q in range(2):
        for c in range(3):
            alone = over_prompts(sums[q, :, c].tolist(), weights[:, c].tolist())
            assert (means[q, c], lows[q, c], highs[q, c]) == pytest.approx(alone, rel=1e-9)


@fast
@given(st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_one(data):
    k = data.draw(st.integers(1, 4))
    prompts = data.draw(st.lists(st.integers(k, 6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
                                 min_size=1, max_size=6))  # fmt: skip
    passed = pass_at_k(*(torch.tensor(column) for column in zip(*prompts, strict=True)), k)
    shares = []
    for correct, completions in prompts:
        subsets = list(itertools.combinations([True] * correct + [False] * (completions - correct), k))
        shares.append(sum(map(any, subsets)) / len(subsets))
    assert passed.tolist() == pytest.approx(shares, abs=1e-12)
    found = wilson_over_prompts(passed.tolist(), [1.0] * len(shares))
    assert found.mean == pytest.approx(np.mean(shares), abs=1e-12)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_interval_is_wilson_s_and_neither_empty_nor_outside_at_the_ends(share):
    found = wilson_over_prompts([share] * 25, [1.0] * 25)
    exact = scipy.stats.binomtest(round(25 * share), 25).proportion_ci(method="wilson")
    assert found == pytest.approx((share, exact.low, exact.high), abs=1e-12)
    assert 0 <= found.low < found.high <= 1


def test_with_one_completion_a_prompt_it_is_nearly_wilson_s_binomial_interval():
    """Nearly: the variance is estimated with m - 1."""
    exact = scipy.stats.binomtest(130, 200).proportion_ci(method="wilson")
    found = wilson_over_prompts([1.0] * 130 + [0.0] * 70, [1.0] * 200)
    assert found == pytest.approx((0.65, exact.low, exact.high), abs=3e-4)


def test_pass_at_one_is_the_share_of_each_prompt():
    assert pass_at_k(torch.tensor([1, 3]), torch.tensor([2, 3]), 1).tolist() == [0.5, 1.0]


def test_fewer_completions_than_k_are_refused():
    with pytest.raises(ValueError, match=r"pass@3 needs at least 3 completions a prompt, found 2"):
        pass_at_k(torch.tensor([1, 2]), torch.tensor([3, 2]), 3)
