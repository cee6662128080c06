"""The table of an evaluation: grouped by prompt, ordered, merged, forgotten."""

import pytest
import torch

from lit_opd.measures.intervals import over_prompts, wilson_over_prompts
from lit_opd.measures.yardsticks import PerPrompt, Yardsticks
from lit_opd.types import FinishReason, Rollout, SamplingLaw


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
    found = yardsticks.compute().intervals()
    assert found["kl"] == pytest.approx(over_prompts([15.0, 21.0], [5.0, 3.0]))
    mean, low, high = over_prompts([5.0, 3.0], [2.0, 2.0])
    assert low < 0, "no length is, so the interval ends at 0"
    assert found["length"] == pytest.approx((mean, 0.0, high))
    assert found["truncated_frac"] == pytest.approx(wilson_over_prompts([0.5, 0.0], [1.0, 1.0]))
    assert found["pass_at_2"] == pytest.approx(wilson_over_prompts([1.0, 0.0], [1.0, 1.0]))
    assert found["accuracy"].mean == pytest.approx(0.25), "half a reward is not correct"
    assert found["pass_at_2"].mean == pytest.approx(0.5)
    assert set(found) == {"kl", "length", "truncated_frac", "accuracy", "pass_at_2"}


def test_yardsticks_without_verifier_and_again_after_reset(batch):
    values, rollout, _ = batch
    yardsticks = Yardsticks(["kl", "not measured"], [1, 2])
    for _ in range(2):
        yardsticks.update(values, rollout, None)
        found = yardsticks.compute().intervals()
        assert set(found) == {"kl", "length", "truncated_frac"}
        assert found["kl"].mean == pytest.approx(36 / 8)
        yardsticks.reset()
    assert yardsticks.compute() == PerPrompt([], {}, {})
    assert not list(yardsticks.parameters())
    assert not yardsticks.state_dict()


def test_what_is_kept_of_every_prompt(batch):
    yardsticks = Yardsticks(["kl"], [1, 2])
    yardsticks.update(*batch)
    kept = yardsticks.compute()
    assert kept.numbers == [0, 0]
    assert (kept.sums["kl"], kept.weights["kl"]) == ([15.0, 21.0], [5.0, 3.0])
    assert (kept.sums["length"], kept.weights["length"]) == ([5.0, 3.0], [2.0, 2.0])
    assert (kept.sums["truncated_frac"], kept.weights["truncated_frac"]) == ([0.5, 0.0], [1.0, 1.0])
    assert (kept.sums["pass_at_2"], kept.sums["accuracy"]) == ([1.0, 0.0], [0.5, 0.0])
    found = kept.intervals()
    assert found.keys() == kept.sums.keys() == kept.weights.keys()
    for name, interval in found.items():
        assert sum(kept.sums[name]) / sum(kept.weights[name]) == pytest.approx(interval.mean, rel=1e-12)


def test_prompts_are_kept_in_the_order_of_their_numbers_in_whatever_batches_they_come(batch):
    values, rollout, _ = batch
    parts = [Yardsticks(["kl"], [1]) for _ in range(2)]
    yardsticks = Yardsticks(["kl"], [1])
    for part, (factor, numbers) in zip(parts, ((1, [7, 1]), (10, [0, 3])), strict=True):
        for metric in (part, yardsticks):
            metric.update({"kl": factor * values["kl"]}, rollout, None, numbers)
    parts[0].merge_state(parts[1])
    for kept in (yardsticks.compute(), parts[0].compute()):
        assert kept.numbers == [0, 1, 3, 7]
        assert kept.sums["kl"] == [150.0, 21.0, 210.0, 15.0]
        assert "accuracy" not in kept.sums
