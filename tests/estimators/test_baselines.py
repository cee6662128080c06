"""Baselines and exact returns: against double loops, unbiased by enumeration, and how their variances compare."""

from dataclasses import replace

import pytest
import torch

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import (
    TabularPair,
    exact_gradient,
    expected_gradient,
    trace_variance,
    trajectory_gradients,
    verify,
)
from lit_opd.types import Need, TokenBatch

MASK = torch.tensor(
    [[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
    dtype=torch.bool,
)
GROUPS = [3, 3, 3, 8, 5]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
RETURNS = ["leave_one_out", "rao_blackwell_return", "centred_rao_blackwell_return", "exact_local_return"]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher, kl = -2 * torch.rand(3, *MASK.shape, generator=generator, dtype=torch.float64)
    support = (-3 * torch.rand(2, *MASK.shape, 3, generator=generator, dtype=torch.float64)).sub(1)
    return TokenBatch(
        student.requires_grad_(), teacher, student.detach(), MASK, kl_BT=-kl, groups_B=torch.tensor(GROUPS),
        support_mask_BTK=torch.rand(*MASK.shape, 3, generator=generator) > 0.3,
        student_support_logps_BTK=support[0].requires_grad_(), teacher_support_logps_BTK=support[1],
    )  # fmt: skip


def gradient(name, tokens, **keywords):
    loss = torch.where(tokens.mask_BT, build(name, **keywords)(tokens).loss_BT, 0.0).sum()
    return torch.autograd.grad(loss, tokens.student_logps_BT)[0]


class Rows:
    """The same batch as nested lists, with everything summed by hand."""

    def __init__(self, tokens):
        self.d = (tokens.student_logps_BT - tokens.teacher_logps_BT).tolist()
        self.kl = tokens.kl_BT.tolist()
        self.p = tokens.student_support_logps_BTK.detach().exp().tolist()
        self.ratio = (tokens.student_support_logps_BTK - tokens.teacher_support_logps_BTK).tolist()
        self.slots = tokens.support_mask_BTK.tolist()

    def later(self, values, b, t, gamma):
        return sum(gamma ** (i - t) * values[b][i] for i in range(t, MASK.shape[1]) if MASK[b, i])

    def to_go(self, b, t, gamma):
        return self.later(self.d, b, t, gamma)

    def future(self, b, t, gamma):
        return self.later(self.kl, b, t, gamma) - (self.kl[b][t] if MASK[b, t] else 0.0)

    def centred(self, returns, b, t, gamma):
        others = [c for c in range(len(GROUPS)) if c != b and GROUPS[c] == GROUPS[b]]
        mean = sum(returns(c, t, gamma) for c in others) / len(others) if others else 0.0
        return returns(b, t, gamma) - mean

    def on_support(self, b, t):
        return sum(p * d for p, d, slot in zip(self.p[b][t], self.ratio[b][t], self.slots[b][t], strict=True) if slot)


CASES = [
    ("vopd", {}, lambda r, b, t: r.d[b][t] - r.kl[b][t]),
    ("vopd_topk", {"k": 3}, lambda r, b, t: r.d[b][t] - r.on_support(b, t)),
    *(
        case
        for gamma in (0.0, 0.6, 1.0)
        for case in (
            ("leave_one_out", {"gamma": gamma}, lambda r, b, t, g=gamma: r.centred(r.to_go, b, t, g)),
            ("rao_blackwell_return", {"gamma": gamma},
             lambda r, b, t, g=gamma: r.d[b][t] - r.kl[b][t] + r.future(b, t, g)),
            ("centred_rao_blackwell_return", {"gamma": gamma},
             lambda r, b, t, g=gamma: r.d[b][t] - r.kl[b][t] + r.centred(r.future, b, t, g)),
            ("future_kl_return", {"gamma": gamma}, lambda r, b, t, g=gamma: r.centred(r.future, b, t, g)),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keywords", "credit"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_credit_is_the_double_loop_and_skips_what_is_masked(name, keywords, credit, seed):
    tokens = batch(seed)
    expected, rows = torch.zeros_like(tokens.teacher_logps_BT), Rows(tokens)
    for b, t in MASK.nonzero().tolist():
        expected[b, t] = credit(rows, b, t)
    torch.testing.assert_close(gradient(name, tokens, **keywords), expected, **EXACT)


def test_no_gradient_reaches_the_support_through_its_baseline():
    tokens = batch()
    loss = build("vopd_topk", k=3)(tokens).loss_BT.sum()
    (found,) = torch.autograd.grad(loss, tokens.student_support_logps_BTK, allow_unused=True)
    assert found is None


@pytest.mark.parametrize("name", ["vopd", "rao_blackwell_return", "centred_rao_blackwell_return", "future_kl_return"])
def test_where_the_exact_kl_is_known_it_is_logged(name):
    tokens = batch()
    assert torch.equal(build(name)(tokens).kl_BT, tokens.kl_BT)


# Completions that end at different lengths count 0 past their end in the mean of the others.
STOPPING = TabularPair.random(3, 4, seed=3, stop=True)
FIXED = TabularPair.random(3, 3, seed=3)


@pytest.mark.parametrize("pair", [STOPPING, FIXED], ids=["different-lengths", "fixed-length"])
@pytest.mark.parametrize("name", RETURNS)
def test_undiscounted_returns_are_unbiased_for_the_sequence(name, pair):
    found = expected_gradient(pair, build(name))
    torch.testing.assert_close(found, exact_gradient(pair, "sequence_reverse_kl"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("pair", [STOPPING, FIXED], ids=["different-lengths", "fixed-length"])
@pytest.mark.parametrize("name", RETURNS)
def test_in_between_all_aim_where_hybrid_does(name, pair):
    for gamma in (0.0, 0.3, 0.9):
        found = expected_gradient(pair, build(name, gamma=gamma))
        torch.testing.assert_close(found, expected_gradient(pair, build("hybrid", gamma=gamma)), rtol=0, atol=1e-13)


def test_a_mean_that_holds_the_completion_itself_would_be_biased():
    """The mutant the leave-one-out guards against: the batch mean shrinks the gradient."""

    def centred_on_all(tokens):
        estimate = build("leave_one_out")(tokens)
        return replace(estimate, loss_BT=estimate.loss_BT / 2)  # with two rows, own - mean is half of own - other

    estimator = build(centred_on_all)
    estimator = replace(
        estimator, spec=replace(estimator.spec, needs=frozenset({Need.TOKEN, Need.GROUPS}), family="sequence")
    )
    assert verify(estimator, STOPPING, "sequence_reverse_kl").relative_bias == pytest.approx(0.5)


def test_future_kl_return_is_the_sequence_gradient_minus_the_local_one():
    for pair in (STOPPING, FIXED):
        expected = exact_gradient(pair, "sequence_reverse_kl") - exact_gradient(pair, "reverse_kl")
        torch.testing.assert_close(expected_gradient(pair, build("future_kl_return")), expected, rtol=0, atol=1e-13)


def test_a_completion_alone_in_its_group_keeps_its_return():
    tokens = replace(batch(), groups_B=torch.arange(len(GROUPS)))
    for name, plain in (("centred_rao_blackwell_return", "rao_blackwell_return"), ("leave_one_out", "sequence")):
        torch.testing.assert_close(gradient(name, tokens), gradient(plain, tokens), **EXACT)


def near_memoryless(noise, seed=2, horizon=4, stop=False):
    """Models whose next-token distribution depends little on the prefix, as that of long text does on one token."""
    pair = TabularPair.random(3, horizon, seed=seed, stop=stop)
    student_V, shift_V = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return replace(
        pair,
        student_logits_CV=student_V + noise * pair.student_logits_CV,
        teacher_logits_CV=student_V + shift_V + noise * pair.teacher_logits_CV,
    )


def test_where_the_future_is_the_same_for_all_nothing_is_left_of_it():
    """Without memory and with one length, the KLs to come do not depend on the completion: centring takes all."""
    pair = near_memoryless(0.0)
    for name, local in (("centred_rao_blackwell_return", "vopd"), ("exact_local_return", "full_vocab")):
        assert trace_variance(pair, build(name)) == pytest.approx(trace_variance(pair, build(local)), rel=1e-12)
    _, gradients = trajectory_gradients(pair, build("future_kl_return"))
    assert gradients.abs().max() < 1e-14
    assert trace_variance(pair, build("rao_blackwell_return")) > 2 * trace_variance(pair, build("vopd"))


VARIANCE_ORDER = ["full_vocab", "exact_local_return", "vopd", "centred_rao_blackwell_return", "token",
                  "rao_blackwell_return", "sequence"]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_variances_on_models_with_little_memory(seed):
    """The sequence KL from exact parts costs less than the sampled local one, and a fraction of the sampled return."""
    pair = near_memoryless(0.2, seed)
    variances = [trace_variance(pair, build(name)) for name in VARIANCE_ORDER]
    assert sorted(variances) == variances
    assert variances[-1] > 8 * variances[1]


@pytest.mark.parametrize("seed", range(3))
def test_exact_local_return_has_less_variance_than_sampled_and_than_centred_returns(seed):
    """On unrelated models too, with completions that end anywhere; the other ranks change from one to the next."""
    pair = TabularPair.random(3, 5, seed=seed, stop=True)
    others = ["sequence", "leave_one_out", "centred_rao_blackwell_return"]
    assert trace_variance(pair, build("exact_local_return")) < min(trace_variance(pair, build(n)) for n in others)


def test_the_exact_kl_is_not_the_baseline_of_least_variance():
    pair = TabularPair.random(3, 5, seed=2, stop=True)
    assert trace_variance(pair, build("vopd")) > 3 * trace_variance(pair, build("token"))


def test_one_other_completion_can_quadruple_the_variance():
    pair = TabularPair.random(3, 5, seed=2, stop=True)
    assert trace_variance(pair, build("leave_one_out")) > 4 * trace_variance(pair, build("sequence"))


def test_topk_baselines_reach_the_exact_one_as_the_support_grows():
    pair = TabularPair.random(4, 3, seed=3)
    found = expected_gradient(pair, build("vopd_topk", k=1))
    torch.testing.assert_close(found, exact_gradient(pair, "reverse_kl"), rtol=0, atol=1e-13)
    (_, whole), (_, exact) = (trajectory_gradients(pair, e) for e in (build("vopd_topk", k=4), build("vopd")))
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "name", ["vopd", "leave_one_out", "rao_blackwell_return", "centred_rao_blackwell_return", "future_kl_return"]
)
def test_extreme_log_ratios_are_finite_in_fp32(name):
    student = torch.tensor([[-60.0, -1e-6, -60.0], [-1e-6, -60.0, -1e-6]], requires_grad=True)
    tokens = TokenBatch(student, student.detach().flip(0), student.detach(), torch.ones(2, 3, dtype=torch.bool),
                        kl_BT=torch.full((2, 3), 60.0), groups_B=torch.tensor([0, 0]))  # fmt: skip
    assert build(name)(tokens).loss_BT.isfinite().all()
    assert gradient(name, tokens).isfinite().all()


@pytest.mark.parametrize("name", [*RETURNS, "future_kl_return"])
@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_a_discount_outside_zero_to_one_is_refused(name, gamma):
    with pytest.raises(UserError, match=r"gamma must lie in \[0, 1\]"):
        build(name, gamma=gamma)


@pytest.mark.parametrize("k", [0, 1.5, True])
def test_a_support_without_a_token_is_refused(k):
    with pytest.raises(UserError, match="k must be a whole number of at least 1"):
        build("vopd_topk", k=k)


@pytest.mark.parametrize("name", RETURNS)
def test_contract_follows_the_discount(name):
    assert build(name).contract[:2] == ("sequence_reverse_kl", True)
    assert build(name, gamma=0).contract[:2] == ("reverse_kl", True)
    assert build(name, gamma=0.9).contract[:2] == ("sequence_reverse_kl", False)
