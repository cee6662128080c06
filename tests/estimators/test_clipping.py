"""Where a limit was active: against each rule in numpy, through sums and weights, and in all that calls a limit."""

import math
from collections.abc import Mapping
from dataclasses import replace
from inspect import unwrap
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch

from lit_opd import estimators
from lit_opd.estimators import any_clipped, build
from lit_opd.estimators.oracle.batches import example_batch
from lit_opd.types import Estimate


def batch_for(estimator, seed=0):
    """Two models, and stale samples: the sampler is another one."""
    tokens = example_batch(estimator, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    drift = 0.8 * torch.randn(tokens.mask_BT.shape, generator=generator, dtype=torch.float64)
    return replace(tokens, sampler_logps_BT=(tokens.student_logps_BT + drift).clamp(max=-0.01))


def arrays(tokens):
    """d = log p - log q, r = p / mu, and the probabilities p and mu, of the sampled tokens."""
    log_p, log_q, log_mu = (
        x.numpy() for x in (tokens.student_logps_BT, tokens.teacher_logps_BT, tokens.sampler_logps_BT)
    )
    return log_p - log_q, np.exp(log_p - log_mu), np.exp(log_p), np.exp(log_mu)


def beyond(limit):
    return lambda tokens: np.abs(arrays(tokens)[0]) > limit


def above(limit):
    return lambda tokens: arrays(tokens)[0] > limit


def ratio_above(cap):
    return lambda tokens: arrays(tokens)[1] > cap


def outside_band(low, high):
    def rule(tokens):
        r = arrays(tokens)[1]
        return (r < low) | (r > high)

    return rule


def dropped_by_more_than(max_drop):
    def rule(tokens):
        _, _, p, mu = arrays(tokens)
        return mu - p > max_drop

    return rule


def dual_clipped(low, high, dual):
    """A good token is held back above the band; a bad one is spared below it, and bounded beyond the dual clip."""

    def rule(tokens):
        d, r, *_ = arrays(tokens)
        return np.where(d < 0, r > 1 + high, (r < 1 - low) | (r > dual))

    return rule


def floored_and_kept(mixture, share):
    def rule(tokens):
        d, mask, entropy = arrays(tokens)[0], tokens.mask_BT.numpy(), tokens.student_entropy_BT.numpy()
        found = np.zeros_like(mask)
        for b, row in enumerate(mask):
            counted = sorted(np.flatnonzero(row), key=lambda t, b=b: -entropy[b, t])
            for t in counted[: math.ceil(share * len(counted))]:
                found[b, t] = -d[b, t] < math.log(mixture / (1 - mixture))
        return found

    return rule


def evidence_outside(max_change):
    """The reward against the one other completion of its prompt decides whether the factor is q / p or p / q."""

    def rule(tokens):
        d, (a, b, c, e) = arrays(tokens)[0], tokens.rewards_B.tolist()
        advantage = np.array([a - b, b - a, c - e, e - c])[:, None]
        factor = np.exp(-np.sign(advantage) * d)
        return (factor < 1 - max_change) | (factor > 1 + max_change)

    return rule


def negative_forward_sum(tokens):
    log_p, log_q = tokens.student_support_logps_BTK.numpy(), tokens.teacher_support_logps_BTK.numpy()
    return (np.exp(log_q) * (log_q - log_p) * tokens.support_mask_BTK.numpy()).sum(-1) < 0


# Name, keywords, the rule with these, and keywords so wide that nothing here meets them (None: it has none).
CASES = [
    ("clipped_log_ratio", {"max_log_ratio": 0.8}, beyond(0.8), {"max_log_ratio": 50.0}),
    ("tropd", {"trust": 0.3}, above(0.3), {"trust": 50.0}),
    ("tropd", {"trust": 0.3, "outlier": "clip"}, above(0.3), {"trust": 50.0, "outlier": "clip"}),
    ("tropd_forward", {"trust": 0.3, "k": 2}, above(0.3), {"trust": 50.0, "k": 2}),
    ("reopold", {"mixture": 0.3}, floored_and_kept(0.3, 1.0), {"mixture": 1e-9}),
    ("reopold", {"mixture": 0.3, "entropy_share": 0.5},
     floored_and_kept(0.3, 0.5), {"mixture": 1e-9, "entropy_share": 0.5}),
    ("exopd", {"max_ratio": 1.2}, ratio_above(1.2), {"max_ratio": 1e6}),
    ("mopd", {"low": 0.7, "high": 1.3}, outside_band(0.7, 1.3), {"low": 0.0, "high": 1e6}),
    ("importance_reverse_kl", {"cap": 1.2}, ratio_above(1.2), {"cap": 1e6}),
    ("importance_reverse_kl", {"correction": "band"}, outside_band(0.5, 2.0),
     {"correction": "band", "low": 0.0, "high": 1e6}),
    ("importance_reverse_kl", {"correction": "one_sided", "max_drop": 0.05}, dropped_by_more_than(0.05),
     {"correction": "one_sided", "max_drop": 1.0}),
    ("ppo_reverse_kl", {"dual_clip": 1.5}, dual_clipped(0.2, 0.2, 1.5),
     {"clip_low": 1.0, "clip_high": 1e6, "dual_clip": 1e6}),
    ("rlsd", {"max_change": 0.4}, evidence_outside(0.4), None),
    ("topk_truncated_forward_kl", {"clamp": True, "k": 2}, negative_forward_sum, None),
    ("topk_truncated_forward_kl", {"clamp": True, "k": 2, "support": "union"}, negative_forward_sum, None),
]  # fmt: skip
IDS = ["-".join([name, *map(str, keywords.values())]) for name, keywords, *_ in CASES]


@pytest.mark.parametrize(("name", "keywords", "rule", "_wide"), CASES, ids=IDS)
def test_activity_is_where_the_rule_says(name, keywords, rule, _wide):
    estimator, shares = build(name, **keywords), []
    for seed in range(20):
        tokens = batch_for(estimator, seed)
        found, mask = estimator(tokens).clipped_BT, tokens.mask_BT
        assert found.dtype == torch.bool
        assert found[mask].tolist() == rule(tokens)[mask.numpy()].tolist()
        shares.append(found[mask].double().mean().item())
    assert 0.02 < np.mean(shares) < 0.98


# Without those whose limits cannot be set wide enough.
WIDE = [(name, keywords, wide) for name, keywords, _, wide in CASES if wide is not None]


@pytest.mark.parametrize(("name", "keywords", "wide"), WIDE)
def test_the_term_is_that_of_wide_limits_exactly_where_nothing_is_active(name, keywords, wide):
    """What activity means: the gradient is another one there, and nowhere else."""
    narrow, free = build(name, **keywords), build(name, **wide)
    for seed in range(20):
        tokens = batch_for(narrow, seed)
        changed = slopes(narrow, tokens) != slopes(free, tokens)
        assert changed[tokens.mask_BT].tolist() == narrow(tokens).clipped_BT[tokens.mask_BT].tolist()
        assert not free(tokens).clipped_BT[tokens.mask_BT].any()


def slopes(estimator, tokens):
    """The gradient on the log-probability of every sampled token."""
    leaf = tokens.student_logps_BT.clone().requires_grad_()
    loss = torch.where(tokens.mask_BT, estimator(replace(tokens, student_logps_BT=leaf)).loss_BT, 0.0).sum()
    return torch.autograd.grad(loss, leaf)[0]


LIMITS = {"clamp", "clip", "clamp_min", "clamp_max", "minimum", "maximum", "truncated_ratio", "banded_ratio",
          "one_sided_ratio"}  # fmt: skip
NO_LIMIT = {
    "importance_ratio": "keeps exp finite at log-ratios beyond 20, where no weight carries information",
    "outside_logp": "rounding: a mass outside the support below zero",
    "logit_matching": "rounding: a sum of weights of zero",
    "leave_one_out_advantage": "rounding: a variance below zero",
    "leave_one_out_mean": "a count of rows, at least one",
    "remaining_mean": "a count of positions, at least one",
    "_largest": "a count of positions, at least one",
    "keep_top": "a count of positions, at least one",
    "entropy_weighted": "rounding: an entropy below zero; a count of positions, at least one",
}


def limiting(fn, seen):
    """The functions of this package, among `fn` and what it calls, that call something which limits."""
    if fn in seen or not fn.__module__.startswith("lit_opd."):
        return set()
    seen.add(fn)
    names = {name for code in codes(fn.__code__) for name in code.co_names}
    found = {fn.__name__} if names & LIMITS and fn.__name__ not in LIMITS else set()
    reached = [fn.__globals__.get(name) for name in names]
    reached += [getattr(module, name, None) for module in reached if isinstance(module, ModuleType) for name in names]
    for value in reached:
        for inner in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(inner, FunctionType):
                found |= limiting(inner, seen)
    return found


def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from codes(constant)


def test_every_estimator_that_calls_a_limit_says_where_it_is_active():
    called, excused = set(), set()
    for name in estimators.names():
        found = limiting(unwrap(estimators.get(name).fn), set())
        excused |= found & NO_LIMIT.keys()
        if found - NO_LIMIT.keys():
            called.add(name)
    tested = {name for name, *_ in CASES}
    assert called - tested == set()
    # These two compare with `>` and `where`.
    assert tested - called == {"tropd", "tropd_forward"}
    assert excused == NO_LIMIT.keys()


@pytest.mark.parametrize("name", ["token", "k3_loss", "importance_k3", "sequence", "full_vocab", "topk_divergence"])
def test_what_sets_no_limit_says_nothing(name):
    keywords = {"k": 2} if name == "topk_divergence" else {}
    estimator = build(name, **keywords)
    assert estimator(batch_for(estimator)).clipped_BT is None


def test_a_limit_that_is_switched_off_says_nothing():
    for name, keywords in (("topk_truncated_forward_kl", {"k": 2}), ("importance_reverse_kl", {"correction": "full"})):
        estimator = build(name, **keywords)
        assert estimator(batch_for(estimator)).clipped_BT is None


def test_a_mix_is_clipped_where_any_term_is_and_silent_where_none_can_be():
    terms = {"clipped_log_ratio": {"weight": 1.0, "max_log_ratio": 0.8}, "exopd": {"weight": 1.0, "max_ratio": 1.2}}
    mixed = build("mix", terms=terms | {"sequence": 1.0})
    tokens = batch_for(mixed)
    found = mixed(tokens).clipped_BT.numpy()
    one, other = beyond(0.8)(tokens), ratio_above(1.2)(tokens)
    assert (one & ~other).any()
    assert (other & ~one).any()
    assert (found == (one | other)).all()
    silent = build("mix", terms={"token": 1.0, "sequence": 1.0})
    assert silent(batch_for(silent)).clipped_BT is None


def test_a_token_that_a_weighting_drops_has_no_term_to_be_clipped():
    weighted = build("prefix_opd", horizon=1, base={"name": "clipped_log_ratio", "max_log_ratio": 0.3})
    tokens = batch_for(weighted)
    first = tokens.mask_BT & (tokens.mask_BT.cumsum(1) == 1)
    expected = torch.from_numpy(beyond(0.3)(tokens))
    assert (expected & tokens.mask_BT & ~first).any()
    assert torch.equal(weighted(tokens).clipped_BT, expected & first)


def test_any_clipped_is_the_union_of_what_is_known():
    one, other = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    assert any_clipped([None, one, None, other]).tolist() == [True, True, False]
    assert any_clipped([None]) is None
    assert any_clipped([]) is None


def test_a_factor_scales_the_loss_and_leaves_the_logged_kl():
    made = Estimate(torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.25]), torch.tensor([True, True]))
    weighted = made.weighted(torch.tensor([0.0, 2.0]))
    assert weighted.loss_BT.tolist() == [0.0, 6.0]
    assert weighted.kl_BT.tolist() == [0.5, 0.25]
    assert weighted.clipped_BT.tolist() == [False, True]
