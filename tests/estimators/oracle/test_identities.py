"""Gradient identities that the literature uses, or gets wrong; each holds to float64 rounding.

The constructions are written out here and run through the oracle, so that this page is also its test. d is the
log-ratio log p - log q of the sampled token, sg stops the gradient, S is the teacher's top K, P its student mass.
"""

from dataclasses import replace

import pytest
import torch
from references import PAIRS

from lit_opd.estimators import build
from lit_opd.estimators.needs import read_needs
from lit_opd.estimators.oracle import exact_gradient, expected_gradient, second_moment
from lit_opd.types import Estimate

SMALL = {"rtol": 0, "atol": 1e-13}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def bound(fn, needs="token", **kwargs):
    """A function as an estimator that declares what it needs."""
    estimator = build(fn, **kwargs)
    return replace(estimator, spec=replace(estimator.spec, needs=read_needs("needs", needs)))


def expectation(pair, fn, needs="token", **kwargs):
    return expected_gradient(pair, bound(fn, needs, **kwargs))


def token_loss(formula):
    """An estimator from a formula in (log p of the sampled token, d)."""

    def estimator(tokens):
        d = tokens.student_logps_BT - tokens.teacher_logps_BT
        return Estimate(formula(tokens.student_logps_BT, d), d.detach())

    return estimator


def support_loss(formula):
    """An estimator from a formula in (log p on S, log q on S), both under the full softmax."""

    def estimator(tokens, *, k):
        value = formula(tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK)
        return Estimate(value, torch.zeros_like(value).detach())

    return estimator


def head_and_tail(head, tail):
    """A head summed over S plus, where the sampled token is outside S, tail(d) x grad log p of it."""

    def estimator(tokens, *, k):
        log_p, log_q = tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK
        sampled = tokens.student_logps_BT
        # The batch does not say which token was sampled; in this table no two have the same log-probability.
        inside = (log_p == sampled[..., None]).any(-1)
        d = (sampled - tokens.teacher_logps_BT).detach()
        return Estimate(head(log_p, log_q).sum(-1) + torch.where(inside, 0.0, tail(d) * sampled), d)

    return estimator


k1_loss = token_loss(lambda log_p, d: d)
k2_loss = token_loss(lambda log_p, d: d.square() / 2)
k3_loss = token_loss(lambda log_p, d: (-d).exp() - 1 + d)
k1_score = token_loss(lambda log_p, d: d.detach() * log_p)
k3_score = token_loss(lambda log_p, d: ((-d).exp() - 1 + d).detach() * log_p)

mass = support_loss(lambda log_p, log_q: log_p.exp().sum(-1))
log_mass = support_loss(lambda log_p, log_q: log_p.logsumexp(-1))
truncated = support_loss(lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(-1))
truncated_forward = support_loss(lambda log_p, log_q: (log_q.exp() * (log_q - log_p)).sum(-1))
generalised = support_loss(lambda log_p, log_q: (log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()).sum(-1))
soft_targets = support_loss(lambda log_p, log_q: -(log_q.softmax(-1) * log_p).sum(-1))


@support_loss
def renormalised(log_p, log_q):
    return (log_p.softmax(-1) * (log_p.log_softmax(-1) - log_q.log_softmax(-1))).sum(-1)


@support_loss
def tail_bucket(log_p, log_q):
    outside_p, outside_q = 1 - log_p.exp().sum(-1), 1 - log_q.exp().sum(-1)
    nothing_outside = (outside_p < 1e-12) | (outside_q < 1e-12)
    ratio = outside_p.masked_fill(nothing_outside, 1) / outside_q.masked_fill(nothing_outside, 1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) + outside_p * ratio.log()


@support_loss
def weighted_scores(log_p, log_q):
    return (log_p.softmax(-1).detach() * (log_p - log_q).detach() * log_p).sum(-1)


@support_loss
def renormalised_level(log_p, log_q):
    return (log_p.softmax(-1) * (log_p - log_q)).sum(-1).detach() * log_p.logsumexp(-1)


detached_head_and_tail = head_and_tail(lambda log_p, log_q: log_p.exp() * (log_p - log_q).detach(), lambda d: d)
pathwise_head_and_tail = head_and_tail(lambda log_p, log_q: log_p.exp() * (log_p - log_q), lambda d: d)
corrected_head_and_tail = head_and_tail(lambda log_p, log_q: log_p.exp() * (log_p - log_q), lambda d: d + 1)


def test_i1_k1_as_a_loss_has_no_expected_gradient(pair):
    assert expectation(pair, k1_loss).norm() < 1e-14
    assert second_moment(pair, bound(k1_loss)) > 0.1


@pytest.mark.parametrize(
    ("construction", "target"),
    [(k2_loss, "reverse_kl"), (k3_loss, "forward_kl"), (k1_score, "reverse_kl")],
    ids=["i2-k2-loss", "i3-k3-loss-is-forward", "i4-k1-score"],
)
def test_i2_i3_i4_targets(pair, construction, target):
    torch.testing.assert_close(expectation(pair, construction), exact_gradient(pair, target), **SMALL)


def test_i5_k3_as_a_reward(pair):
    expected = exact_gradient(pair, "reverse_kl") - exact_gradient(pair, "forward_kl")
    torch.testing.assert_close(expectation(pair, k3_score), expected, **SMALL)


def test_i6_what_does_not_depend_on_the_token_has_no_gradient(pair):
    def constant_reward(tokens):
        return Estimate(3.0 * tokens.student_logps_BT, tokens.student_logps_BT.detach())

    def exact_kl_as_reward(tokens):
        return Estimate(tokens.kl_BT * tokens.student_logps_BT, tokens.kl_BT)

    def topk_kl_as_reward(tokens, *, k):
        value = renormalised(tokens, k=k).loss_BT.detach()
        return Estimate(value * tokens.student_logps_BT, value)

    assert expectation(pair, constant_reward).norm() < 1e-13
    assert expectation(pair, exact_kl_as_reward, "token+kl").norm() < 1e-13
    assert expectation(pair, topk_kl_as_reward, "support", k=2).norm() < 1e-13


def test_i6_so_the_exact_kl_is_a_free_baseline(pair):
    def baseline(tokens):
        d = (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()
        return Estimate((d - tokens.kl_BT) * tokens.student_logps_BT, d)

    torch.testing.assert_close(expectation(pair, baseline, "token+kl"), exact_gradient(pair, "reverse_kl"), **SMALL)


def discounted_gradient(pair, gamma):
    """By dynamic programming: the credit of a token is d + gamma x the expected credit of what follows it."""
    logits_CV = pair.student_logits_CV.clone().requires_grad_()
    student_CV, teacher_CV = logits_CV.log_softmax(-1), pair.teacher_logits_CV.log_softmax(-1)
    vocabulary = logits_CV.shape[1]
    credit_CV = (student_CV - teacher_CV).detach()
    for context in reversed(range(len(credit_CV))):
        for token in range(vocabulary):
            # Contexts are numbered like the nodes of a heap with V children each.
            child = context * vocabulary + token + 1
            if child < len(credit_CV) and not (pair.stop and token == 0):
                credit_CV[context, token] += gamma * student_CV[child].exp().detach() @ credit_CV[child]
    weights_CV = (pair.reach(student_CV)[:, None] * student_CV.exp() * credit_CV).detach()
    return torch.autograd.grad((weights_CV * student_CV).sum(), logits_CV)[0].flatten()


def test_i7_the_undiscounted_return_is_the_sequence_kl(pair):
    target = exact_gradient(pair, "sequence_reverse_kl")
    torch.testing.assert_close(discounted_gradient(pair, 1.0), target, **SMALL)
    torch.testing.assert_close(expected_gradient(pair, build("sequence")), target, **SMALL)
    torch.testing.assert_close(expected_gradient(pair, build("hybrid", gamma=1.0)), target, **SMALL)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
def test_i7_i8_in_between_the_discount_is_relative_to_the_token(pair, gamma):
    found = expected_gradient(pair, build("hybrid", gamma=gamma))
    torch.testing.assert_close(found, discounted_gradient(pair, gamma), **SMALL)


def test_i8_sampled_and_exact_local_gradients_agree_and_are_not_the_sequence_gradient(pair):
    sampled, exact = (expected_gradient(pair, build(name)) for name in ("token", "full_vocab"))
    torch.testing.assert_close(sampled, exact, **SMALL)
    torch.testing.assert_close(expected_gradient(pair, build("hybrid", gamma=0.0)), exact, **SMALL)
    assert (exact - exact_gradient(pair, "sequence_reverse_kl")).norm() > 1e-2


def test_i9_i10_head_and_sampled_tail(pair):
    target = exact_gradient(pair, "reverse_kl")
    published = expectation(pair, pathwise_head_and_tail, "support", k=2)
    torch.testing.assert_close(expectation(pair, detached_head_and_tail, "support", k=2), target, **SMALL)
    torch.testing.assert_close(published, target + expectation(pair, mass, "support", k=2), **SMALL)
    torch.testing.assert_close(expectation(pair, corrected_head_and_tail, "support", k=2), target, **SMALL)


def test_i11_renormalised_weights_on_full_scores(pair):
    found = expectation(pair, weighted_scores, "support", k=2)
    parts = [expectation(pair, part, "support", k=2) for part in (renormalised, renormalised_level)]
    torch.testing.assert_close(found, parts[0] + parts[1], **SMALL)


@pytest.mark.parametrize(
    ("construction", "needs"),
    [(k1_score, "token"), (k2_loss, "token"), (k3_loss, "token"), (renormalised, "support"), (generalised, "support"),
     (tail_bucket, "support"), (detached_head_and_tail, "support")],
    ids=["k1-score", "k2-loss", "k3-loss", "renormalised", "generalised", "tail-bucket", "detached-head-and-tail"],
)  # fmt: skip
def test_i12_no_sample_has_a_gradient_where_student_equals_teacher(pair, construction, needs):
    estimator = bound(construction, needs, **({"k": 2} if needs == "support" else {}))
    assert second_moment(pair.with_equal_models(), estimator) < 1e-28


@pytest.mark.parametrize(
    ("construction", "remainder", "sign"),
    [(truncated_forward, mass, -1), (truncated, mass, 1), (pathwise_head_and_tail, mass, 1),
     (soft_targets, log_mass, -1)],
    ids=["truncated-forward", "truncated-reverse", "head-and-tail-as-published", "soft-targets"],
)  # fmt: skip
def test_i12_what_moves_the_mass_of_the_support_where_student_equals_teacher(pair, construction, remainder, sign):
    equal = pair.with_equal_models()
    expected = sign * expectation(equal, remainder, "support", k=2)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(expectation(equal, construction, "support", k=2), expected, **SMALL)


def test_i12_k1_as_a_loss_is_zero_only_in_expectation(pair):
    equal = pair.with_equal_models()
    assert expectation(equal, k1_loss).norm() < 1e-14
    assert second_moment(equal, bound(k1_loss)) > 0.1


@pytest.mark.parametrize(
    "construction",
    [renormalised, generalised, tail_bucket, detached_head_and_tail, corrected_head_and_tail],
    ids=["renormalised", "generalised", "tail-bucket", "detached-head-and-tail", "corrected-head-and-tail"],
)
def test_i13_on_the_whole_vocabulary_all_supports_are_the_reverse_kl(pair, construction):
    found = expectation(pair, construction, "support", k=pair.student_logits_CV.shape[1])
    torch.testing.assert_close(found, exact_gradient(pair, "reverse_kl"), **SMALL)


def test_i14_renormalised_over_one_token_nothing_is_left(pair):
    assert second_moment(pair, bound(renormalised, "support", k=1)) == 0
