"""Intervals against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.metrics import AvgAtK, Interval, PassAtK, PerPrompt, PromptMean, Yardsticks
from lit_opd.types import FinishReason, Rollout, SamplingLaw

fast = settings(max_examples=60, deadline=None)


def prompt_mean(sums, weights, confidence=0.95):
    metric = PromptMean(confidence)
    # float64, as the references are: rounded to fp32 the metric would be asked about other numbers.
    metric.update(torch.tensor(sums, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))
    return metric.compute()


@fast
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.floats(0.5, 0.99))
def test_with_equal_weights_it_is_student_s_interval_of_the_mean(values, confidence):
    found = prompt_mean(values, [1.0] * len(values), confidence)
    mean, error = np.mean(values), scipy.stats.sem(values)
    if error < 1e-6:  # the interval is a point, up to the rounding of sums of squares
        assert found == pytest.approx((mean,) * 3, abs=1e-3)
    else:
        low, high = scipy.stats.t.interval(confidence, len(values) - 1, mean, error)
        assert found == pytest.approx((mean, low, high), rel=1e-6, abs=1e-6)


def test_with_unequal_weights_it_is_the_ratio_estimator_s_interval():
    sums, weights = np.array([3.0, 10.0, 1.0, 7.0]), np.array([2.0, 5.0, 2.0, 3.0])
    found = prompt_mean(sums.tolist(), weights.tolist())
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
        found = prompt_mean([float(v.sum()) for v in values], counts.astype(float).tolist())
        covered += found.low <= 1.0 <= found.high
        pooled = np.concatenate(values)
        low, high = scipy.stats.t.interval(0.95, len(pooled) - 1, pooled.mean(), scipy.stats.sem(pooled))
        naive += low <= 1.0 <= high
    assert 0.92 <= covered / 300 <= 0.98
    assert naive / 300 < 0.75, "the simulation does not tell the two apart"


def test_nothing_and_one_prompt():
    assert all(map(math.isnan, PromptMean().compute()))
    assert all(map(math.isnan, prompt_mean([0.0, 0.0], [0.0, 0.0])))
    assert prompt_mean([6.0], [4.0]) == Interval(1.5, -math.inf, math.inf)


@pytest.mark.parametrize("metric", [PromptMean, lambda: PassAtK(2)], ids=["mean", "pass@2"])
def test_merged_states_are_one_big_update(metric):
    sums, weights = torch.tensor([1.0, 0.0, 3.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 4.0, 2.0, 5.0])
    whole, batches, parts = metric(), metric(), [metric(), metric()]
    whole.update(sums, weights)
    for part in (slice(0, 2), slice(2, 5)):
        batches.update(sums[part], weights[part])
    parts[0].update(sums[:1], weights[:1])
    parts[1].update(sums[1:], weights[1:])
    parts[0].merge_state(parts[1])
    assert batches.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert parts[0].compute() == pytest.approx(whole.compute(), rel=1e-12)


@fast
@given(st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_one(data):
    k = data.draw(st.integers(1, 4))
    prompts = data.draw(st.lists(st.integers(k, 6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
                                 min_size=1, max_size=6))  # fmt: skip
    metric = PassAtK(k)
    metric.update(*(torch.tensor(column) for column in zip(*prompts, strict=True)))
    shares = []
    for correct, completions in prompts:
        subsets = list(itertools.combinations([True] * correct + [False] * (completions - correct), k))
        shares.append(sum(map(any, subsets)) / len(subsets))
    found = metric.compute()
    assert found.mean == pytest.approx(np.mean(shares), abs=1e-12)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize(("correct", "expected"), [(0, 0.0), (4, 1.0)])
def test_the_interval_is_wilson_s_and_neither_empty_nor_outside_at_the_ends(correct, expected):
    metric = PassAtK(1)
    metric.update(torch.full((25,), correct), torch.full((25,), 4))
    found = metric.compute()
    exact = scipy.stats.binomtest(round(25 * expected), 25).proportion_ci(method="wilson")
    assert found == pytest.approx((expected, exact.low, exact.high), abs=1e-12)
    assert 0 <= found.low < found.high <= 1


def test_with_one_completion_a_prompt_it_is_nearly_wilson_s_binomial_interval():
    """Nearly: the variance is estimated with m - 1."""
    metric = AvgAtK()
    metric.update(torch.tensor([1] * 130 + [0] * 70), torch.ones(200))
    exact = scipy.stats.binomtest(130, 200).proportion_ci(method="wilson")
    assert metric.compute() == pytest.approx((0.65, exact.low, exact.high), abs=3e-4)


def test_avg_at_k_is_the_mean_accuracy_over_prompts():
    metric = AvgAtK()
    metric.update(torch.tensor([1, 3]), torch.tensor([2, 3]))
    assert metric.compute().mean == pytest.approx(0.75)


def test_fewer_completions_than_k_are_refused():
    with pytest.raises(ValueError, match=r"pass@3 needs at least 3 completions a prompt, found 2"):
        PassAtK(3).update(torch.tensor([1, 2]), torch.tensor([3, 2]))


@pytest.fixture
def batch():
    """Two prompts with two completions each: values, rollout, rewards."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    finish = torch.tensor([FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP])
    prompts = torch.ones(4, 1, dtype=torch.long)
    rollout = Rollout(prompts, prompts.bool(), mask.long(), mask, mask, mask.float(), finish, SamplingLaw(),
                      torch.tensor([0, 0, 1, 1]))  # fmt: skip
    values = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [6.0, 0.0, 0.0], [7.0, 8.0, 0.0]])
    return {"kl": values}, rollout, torch.tensor([1.0, 0.0, 0.0, 0.5])


def test_yardsticks_group_completions_by_prompt(batch):
    yardsticks = Yardsticks(["kl"], [1, 2])
    yardsticks.update(*batch)
    found = yardsticks.compute()
    assert found["kl"] == pytest.approx(prompt_mean([15.0, 21.0], [5.0, 3.0]))
    assert found["length"] == pytest.approx(prompt_mean([5.0, 3.0], [2.0, 2.0]))
    share = AvgAtK()
    share.update(torch.tensor([1, 0]), torch.tensor([2, 2]))
    assert found["truncated_frac"] == pytest.approx(share.compute())
    assert found["accuracy"].mean == pytest.approx(0.25), "half a reward is not correct"
    assert found["pass_at_2"].mean == pytest.approx(0.5)
    assert set(found) == {"kl", "length", "truncated_frac", "accuracy", "pass_at_2"}


def test_yardsticks_without_verifier_and_again_after_compute(batch):
    values, rollout, _ = batch
    yardsticks = Yardsticks(["kl"], [1, 2])
    for _ in range(2):
        yardsticks.update(values, rollout, None)
        found = yardsticks.compute()
        assert set(found) == {"kl", "length", "truncated_frac"}
        assert found["kl"].mean == pytest.approx(36 / 8)
    assert not list(yardsticks.parameters())
    assert not yardsticks.state_dict()


def test_every_metric_is_the_sum_over_prompts_of_what_is_kept_of_each(batch):
    yardsticks = Yardsticks(["kl"], [1, 2])
    yardsticks.update(*batch)
    kept = yardsticks.per_prompt()
    assert kept.numbers == [0, 0]
    assert (kept.sums["kl"], kept.weights["kl"]) == ([15.0, 21.0], [5.0, 3.0])
    assert (kept.sums["length"], kept.weights["length"]) == ([5.0, 3.0], [2.0, 2.0])
    assert (kept.sums["truncated_frac"], kept.weights["truncated_frac"]) == ([0.5, 0.0], [1.0, 1.0])
    assert (kept.sums["pass_at_2"], kept.sums["accuracy"]) == ([1.0, 0.0], [0.5, 0.0])
    found = yardsticks.compute()
    assert found.keys() == kept.sums.keys() == kept.weights.keys()
    for name, interval in found.items():
        assert sum(kept.sums[name]) / sum(kept.weights[name]) == pytest.approx(interval.mean, rel=1e-12)
    assert yardsticks.per_prompt() == PerPrompt([], {}, {}), "reset with the metrics"


def test_prompts_are_kept_in_the_order_of_their_numbers(batch):
    values, rollout, _ = batch
    yardsticks = Yardsticks(["kl"], [1])
    yardsticks.update(values, rollout, None, [7, 1])
    yardsticks.update({"kl": 10 * values["kl"]}, rollout, None, [0, 3])
    kept = yardsticks.per_prompt()
    assert kept.numbers == [0, 1, 3, 7]
    assert kept.sums["kl"] == [150.0, 21.0, 210.0, 15.0]
    assert "accuracy" not in kept.sums
