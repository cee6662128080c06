"""Distillation with an outcome reward, against loops over plain numbers and against exact gradients."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trace_variance
from lit_opd.estimators.outcomes import group_mean, leave_one_out_advantage
from lit_opd.types import TokenBatch

PAIRS = {
    "fixed-length": TabularPair.random(3, 3, seed=11),
    "with-stop-token": TabularPair.random(4, 3, seed=12, stop=True),
    "far-apart": TabularPair.random(4, 2, seed=13, scale=2.0),
}
TIGHT = {"rtol": 0, "atol": 1e-12}
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def expectation(pair, name, **keywords):
    return expected_gradient(pair, estimators.build(name, **keywords))


def random_batch(seed, rows=None, length=None):
    """Random log-probabilities; masks have holes, some rows count nothing, prompts have one to five completions."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows or int(torch.randint(1, 6, (), generator=generator))
    length = length or int(torch.randint(1, 6, (), generator=generator))
    mask_BT = torch.rand(rows, length, generator=generator) > 0.3
    student, teacher, sampler = -3 * torch.rand(3, rows, length, generator=generator).double()
    return TokenBatch(
        student, teacher, student + 0.2 * sampler, mask_BT,
        rewards_B=torch.randint(3, (rows,), generator=generator).double() / 2,
        groups_B=torch.randint(2, (rows,), generator=generator) + 7,
    )  # fmt: skip


def coefficients(estimator, tokens):
    """Derivative of the masked sum of losses by every student log-probability."""
    leaf = tokens.student_logps_BT.clone().requires_grad_()
    loss_BT = estimator(replace(tokens, student_logps_BT=leaf)).loss_BT
    return torch.autograd.grad(torch.where(tokens.mask_BT, loss_BT, 0.0).sum(), leaf)[0]


def advantages_by_loop(rewards, groups, normalise):
    found = []
    for row, reward in enumerate(rewards):
        others = [r for i, r in enumerate(rewards) if groups[i] == groups[row] and i != row]
        advantage = reward - (statistics.fmean(others) if others else 0.0)
        deviation = statistics.stdev([reward, *others]) if others else 0.0
        found.append(advantage / deviation if normalise and deviation > 0 else advantage)
    return found


def by_loop(tokens, credit, normalise, rewards=None):
    """Minus the advantage of every counted token, from `credit(A, d, p, q, mu, reward)`."""
    p, q, mu = (x.tolist() for x in (tokens.student_logps_BT, tokens.teacher_logps_BT, tokens.sampler_logps_BT))
    rewards = rewards or tokens.rewards_B.tolist()
    advantages = advantages_by_loop(rewards, tokens.groups_B.tolist(), normalise)
    return torch.tensor(
        [[credit(advantages[b], p[b][t] - q[b][t], p[b][t] - mu[b][t], rewards[b]) if counts else 0.0
          for t, counts in enumerate(row)] for b, row in enumerate(tokens.mask_BT.tolist())],
        dtype=torch.float64,
    )  # fmt: skip


def sign(x):
    return (x > 0) - (x < 0)


CREDITS = {  # of the advantage A, the log-ratio d, the log of the importance ratio i and the reward r
    "outcome": ({}, lambda A, d, i, r: -A),
    "outcome_mix": ({"kl_weight": 0.3, "outcome_weight": 2.0}, lambda A, d, i, r: 0.3 * d - 2 * A),
    "kdrl": ({"kl_as": "k2", "kl_weight": 0.3}, lambda A, d, i, r: 0.3 * d - A),
    "kdrl as k3": ({"kl_as": "k3", "kl_weight": 0.3}, lambda A, d, i, r: 0.3 * (1 - math.exp(-d)) - A),
    "mopd": ({"outcome_weight": 2.0, "low": 0.8, "high": 1.3},
             lambda A, d, i, r: math.exp(i) * (d - 2 * A) if 0.8 <= math.exp(i) <= 1.3 else 0.0),
    "rlsd": ({"max_change": 0.4}, lambda A, d, i, r: -A * min(max(math.exp(-sign(A) * d), 0.6), 1.4)),
    "srpo": ({"kl_weight": 0.3}, lambda A, d, i, r: -A if r >= 1 else 0.3 * d),
    "srpo at half a reward": ({"pass_reward": 0.5}, lambda A, d, i, r: -A if r >= 0.5 else d),
}  # fmt: skip


@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("name", CREDITS)
@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_credit_of_every_token_is_that_of_a_loop(name, normalise, seed):
    tokens, (keywords, credit) = random_batch(seed), CREDITS[name]
    estimator = estimators.build(name.split()[0], normalise=normalise, **keywords)
    torch.testing.assert_close(coefficients(estimator, tokens), by_loop(tokens, credit, normalise), **TIGHT)
    kl = tokens.student_logps_BT - tokens.teacher_logps_BT
    torch.testing.assert_close(estimator(tokens).kl_BT, kl, **TIGHT)


@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_kdrl_with_the_kl_as_reward_compares_lowered_rewards(normalise, seed):
    tokens = random_batch(seed)
    log_ratio = torch.where(tokens.mask_BT, tokens.student_logps_BT - tokens.teacher_logps_BT, 0.0)
    lowered = [
        reward - 0.3 * sum(row) for reward, row in zip(tokens.rewards_B.tolist(), log_ratio.tolist(), strict=True)
    ]
    found = coefficients(estimators.build("kdrl", kl_as="reward", kl_weight=0.3, normalise=normalise), tokens)
    expected = by_loop(tokens, lambda A, d, i, r: -A, normalise, lowered)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "keywords", "parts"),
    [("outcome", {}, {"outcome": 1}),
     ("outcome_mix", {"kl_weight": 0.7, "outcome_weight": 1.3}, {"reverse_kl": 0.7, "outcome": 1.3}),
     ("kdrl", {"kl_as": "reward", "kl_weight": 0.7}, {"sequence_reverse_kl": 0.7, "outcome": 1}),
     ("kdrl", {"kl_as": "k2", "kl_weight": 0.7}, {"reverse_kl": 0.7, "outcome": 1}),
     ("kdrl", {"kl_as": "k3", "kl_weight": 0.7}, {"forward_kl": 0.7, "outcome": 1}),
     ("mopd", {"outcome_weight": 1.3}, {"reverse_kl": 1, "outcome": 1.3}),
     ("mopd", {"outcome_weight": 1.3, "low": 1.0, "high": 1.0}, {"reverse_kl": 1, "outcome": 1.3}),
     ("rlsd", {"max_change": 0.0}, {"outcome": 1}),
     ("srpo", {"pass_reward": -1.0}, {"outcome": 1}),
     ("srpo", {"pass_reward": 2.0, "kl_weight": 0.7}, {"reverse_kl": 0.7}),
     ("mix", {"terms": {"full_vocab": 0.7, "outcome": 1.3}}, {"reverse_kl": 0.7, "outcome": 1.3})],
    ids=str,
)  # fmt: skip
def test_expected_gradients_are_the_sum_of_the_parts(pair, name, keywords, parts):
    """Over all pairs of completions; the reward is one number a completion, as the KL is a sum over its tokens."""
    expected = sum(weight * exact_gradient(pair, target) for target, weight in parts.items())
    assert expected.norm() > 1e-2
    torch.testing.assert_close(expectation(pair, name, **keywords), expected, **TIGHT)


@pytest.mark.parametrize("name", ["outcome", "outcome_mix", "kdrl", "mopd", "rlsd", "srpo"])
def test_division_by_the_deviation_is_biased(pair, name):
    plain = expectation(pair, name)
    assert (expectation(pair, name, normalise=True) - plain).norm() > 1e-2 * plain.norm()


def test_the_other_completions_are_a_baseline_that_lowers_the_variance():
    def without_baseline(tokens):
        alone = replace(tokens, groups_B=torch.arange(len(tokens.rewards_B)))
        return estimators.build("outcome")(alone)

    pair, spec = TabularPair.random(3, 3, seed=11), estimators.get("outcome")
    bare = replace(estimators.build(without_baseline), spec=replace(spec, fn=without_baseline))
    torch.testing.assert_close(expected_gradient(pair, bare), exact_gradient(pair, "outcome"), **TIGHT)
    assert trace_variance(pair, estimators.build("outcome")) < trace_variance(pair, bare)


def test_a_wide_band_corrects_stale_samples_and_a_narrow_one_does_not():
    pair = TabularPair.random(4, 3, seed=5, stop=True).with_sampler(0.7)
    wanted = exact_gradient(pair, "reverse_kl")
    wide = expectation(pair, "mopd", outcome_weight=0.0, low=0.0, high=math.inf)
    torch.testing.assert_close(wide, wanted, **TIGHT)
    narrow = expectation(pair, "mopd", outcome_weight=0.0, low=0.9, high=1.1)
    uncorrected = expectation(pair, "outcome_mix", outcome_weight=0.0)
    assert min((narrow - wanted).norm(), (uncorrected - wanted).norm()) > 0.1 * wanted.norm()


def test_the_teacher_scales_credit_and_blame_but_turns_neither():
    """Two completions of one prompt, one right and one wrong; the teacher likes the first token of each better."""
    student = torch.full((2, 3), -1.0).double()
    teacher = torch.tensor([[-0.9, -1.1, -9.0], [-0.9, -1.1, -9.0]], dtype=torch.float64)
    tokens = TokenBatch(student, teacher, student, torch.ones(2, 3, dtype=torch.bool),
                        rewards_B=torch.tensor([1.0, 0.0]), groups_B=torch.tensor([0, 0]))  # fmt: skip
    found = coefficients(estimators.build("rlsd"), tokens)
    up, down = math.exp(0.1), math.exp(-0.1)
    expected = torch.tensor([[-up, -down, -0.8], [down, up, 1.2]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **TIGHT)


@given(
    rewards=st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    groups=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_advantages_are_those_of_a_loop_and_sum_to_zero_in_every_prompt(rewards, groups):
    groups = groups[: len(rewards)]
    found = leave_one_out_advantage(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    expected = torch.tensor(advantages_by_loop(rewards, groups, normalise=False), dtype=torch.float64)
    torch.testing.assert_close(found, expected, **TIGHT)
    for group in set(groups):
        if groups.count(group) > 1:
            assert abs(float(found[torch.tensor(groups) == group].sum())) < 1e-11


def test_equal_rewards_give_no_advantage_even_where_rounding_makes_them_differ():
    for reward, size in ((0.1, 3), (0.7, 7), (1.0, 4)):
        rewards = torch.full((size,), reward, dtype=torch.float64)
        for normalise in (False, True):
            advantage = leave_one_out_advantage(rewards, torch.zeros(size, dtype=torch.long), normalise)
            assert advantage.abs().max() < 1e-15


def test_a_completion_alone_with_its_prompt_keeps_its_reward():
    rewards, groups = torch.tensor([0.25, 1.0, 0.0]), torch.tensor([4, 9, 9])
    assert leave_one_out_advantage(rewards, groups).tolist() == [0.25, 1.0, -1.0]
    assert leave_one_out_advantage(rewards, groups, normalise=True)[0] == 0.25
    assert group_mean(rewards, groups).tolist() == [0.25, 0.5, 0.5]


@pytest.mark.parametrize("name", ["outcome", "outcome_mix", "kdrl", "mopd", "rlsd", "srpo"])
def test_all_masked_rows_and_one_token_completions(name):
    tokens = replace(random_batch(4, rows=3, length=5), groups_B=torch.tensor([0, 0, 0]))
    nothing = torch.zeros_like(tokens.mask_BT)
    assert (coefficients(estimators.build(name), replace(tokens, mask_BT=nothing)) == 0).all()
    one = nothing.clone()
    one[0, 0] = one[2, 0] = True
    found = coefficients(estimators.build(name), replace(tokens, mask_BT=one))
    assert found[one].isfinite().all()
    assert (found[~one] == 0).all()


@pytest.mark.parametrize("name", ["outcome", "outcome_mix", "kdrl", "mopd", "rlsd", "srpo"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e4])
def test_what_the_teacher_says_of_masked_tokens_changes_nothing(name, garbage):
    tokens = random_batch(4, rows=4, length=5)
    dirty = replace(tokens, teacher_logps_BT=torch.where(tokens.mask_BT, tokens.teacher_logps_BT, garbage))
    for keywords in ({}, *({"kl_as": kl_as} for kl_as in ("reward", "k3") if name == "kdrl")):
        estimator = estimators.build(name, **keywords)
        assert torch.equal(coefficients(estimator, dirty), coefficients(estimator, tokens))


NOT_BOTH = "kl_weight and outcome_weight must be at least 0 and not both 0, found"
BAND = "low and high must satisfy 0 <= low <= 1 <= high, found"


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("outcome_mix", {"kl_weight": 0.0, "outcome_weight": 0.0}, f"{NOT_BOTH} 0.0 and 0.0"),
     ("outcome_mix", {"kl_weight": -1.0}, f"{NOT_BOTH} -1.0 and 1.0"),
     ("outcome_mix", {"outcome_weight": math.nan}, f"{NOT_BOTH} 1.0 and nan"),
     ("kdrl", {"kl_as": "k1"}, "kl_as must be one of reward, k2, k3, found 'k1'"),
     ("kdrl", {"kl_weight": -0.5}, "kl_weight must be at least 0, found -0.5"),
     ("mopd", {"outcome_weight": -0.5}, "outcome_weight must be at least 0, found -0.5"),
     ("mopd", {"low": 1.1}, f"{BAND} 1.1 and 2.0; on-policy every ratio is 1"),
     ("mopd", {"high": 0.9}, f"{BAND} 0.5 and 0.9"),
     ("mopd", {"low": -0.1}, f"{BAND} -0.1 and 2.0"),
     ("rlsd", {"max_change": 1.5}, r"max_change must lie in \[0, 1\], found 1.5"),
     ("rlsd", {"max_change": -0.1}, r"max_change must lie in \[0, 1\], found -0.1"),
     ("srpo", {"pass_reward": math.nan}, "pass_reward must be finite, found nan"),
     ("srpo", {"kl_weight": -1.0}, "kl_weight must be at least 0, found -1.0")],
)  # fmt: skip
def test_keywords_that_cannot_work_are_refused_before_any_model_loads(name, keywords, message):
    with pytest.raises(UserError, match=message):
        estimators.build(name, **keywords)
