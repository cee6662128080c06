"""The oracle itself: right where the answer is known by other means, and red where an estimator is wrong."""

from dataclasses import replace

import pytest
import torch
from references import log_ratio, made, score_function

from lit_opd.estimators import build
from lit_opd.estimators.oracle import (
    TARGETS,
    TabularPair,
    declared_target,
    exact_gradient,
    expected_gradient,
    pair_for,
    second_moment,
    trace_variance,
    trajectory_gradients,
    verify,
)
from lit_opd.functional.returns import return_to_go
from lit_opd.types import Estimate


def walk(pair, logits_CV, prefix=()):
    """Every completion as (tokens, contexts), by recursion instead of by arithmetic on numbers."""
    vocabulary = logits_CV.shape[1]
    context = 0
    for token in prefix:
        context = context * vocabulary + token + 1
    for token in range(vocabulary):
        here = [(token, context)]
        if len(prefix) + 1 == pair.horizon or (pair.stop and token == 0):
            yield here
        else:
            yield from (here + rest for rest in walk(pair, logits_CV, (*prefix, token)))


@pytest.fixture(params=[False, True], ids=["fixed-length", "with-stop-token"])
def pair(request):
    return TabularPair.random(3, 3, seed=5, stop=request.param)


def test_completions_are_all_there_is(pair):
    ids_BT, mask_BT, contexts_BT = pair.completions()
    found = {tuple(zip(ids[mask].tolist(), contexts[mask].tolist(), strict=True))
             for ids, mask, contexts in zip(ids_BT, mask_BT, contexts_BT, strict=True)}  # fmt: skip
    expected = {tuple(path) for path in walk(pair, pair.student_logits_CV)}
    assert found == expected
    assert len(ids_BT) == len(expected) == (27 if not pair.stop else 1 + 2 + 4 + 8)


def test_probabilities_sum_to_one_and_agree_with_reach(pair):
    probs_B, _ = trajectory_gradients(pair, build("token"))
    _, mask_BT, contexts_BT = pair.completions()
    assert probs_B.sum().item() == pytest.approx(1, abs=1e-14)
    through_C = torch.zeros(len(pair.student_logits_CV)).double()
    for probability, mask, contexts in zip(probs_B, mask_BT, contexts_BT, strict=True):
        through_C[contexts[mask]] += probability
    torch.testing.assert_close(pair.reach(pair.student_logits_CV.log_softmax(-1)), through_C, rtol=0, atol=1e-14)


def test_sampler_writes_the_completions(pair):
    tempered = pair.with_sampler(0.7)
    law_CV = tempered.sampler_logits_CV.softmax(-1)
    expected = {tuple(path): torch.stack([law_CV[c, token] for token, c in path]).prod() for path in walk(pair, law_CV)}
    ids_BT, mask_BT, contexts_BT = tempered.completions()
    probs_B, _ = trajectory_gradients(tempered, build("token"))
    caught = []
    trajectory_gradients(tempered, build(lambda tokens: caught.append(tokens) or score_function(tokens)))
    for row, probability in enumerate(probs_B):
        ids, contexts = ids_BT[row][mask_BT[row]], contexts_BT[row][mask_BT[row]]
        assert probability == pytest.approx(expected[tuple(zip(ids.tolist(), contexts.tolist(), strict=True))])
        torch.testing.assert_close(caught[0].sampler_logps_BT[row][mask_BT[row]], law_CV[contexts, ids].log())


def test_sequence_target_is_the_kl_over_whole_completions(pair):
    logits_CV = pair.student_logits_CV.clone().requires_grad_()
    student_CV, teacher_CV = logits_CV.log_softmax(-1), pair.teacher_logits_CV.log_softmax(-1)
    kl = 0
    for path in walk(pair, logits_CV):
        log_p = sum(student_CV[context, token] for token, context in path)
        log_q = sum(teacher_CV[context, token] for token, context in path)
        kl = kl + log_p.exp() * (log_p - log_q)
    expected = torch.autograd.grad(kl, logits_CV)[0].flatten()
    torch.testing.assert_close(exact_gradient(pair, "sequence_reverse_kl"), expected, rtol=0, atol=1e-14)


def divergence(target, p, q):
    """The definitions, written out a second time."""

    def kl(a, b):
        return sum(x * torch.log(x / y) for x, y in zip(a, b, strict=True))

    if target.endswith("reverse_kl"):
        return kl(p, 0.2 * p + 0.8 * q) if "skew" in target else kl(p, q)
    if target.endswith("forward_kl"):
        return kl(q, 0.2 * q + 0.8 * p) if "skew" in target else kl(q, p)
    if target == "tvd":
        return sum(torch.clamp(x - y, min=0) for x, y in zip(p, q, strict=True))  # the surplus is the lack elsewhere
    mixture = 0.3 * q + 0.7 * p
    return kl(p, mixture) / 0.3 + kl(q, mixture) / 0.7


def numeric_gradient(objective, logits_CV, step=1e-5):
    steps = step * torch.eye(logits_CV.numel()).double().view(-1, *logits_CV.shape)
    return torch.stack([(objective(logits_CV + s) - objective(logits_CV - s)) / (2 * step) for s in steps])


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("outcome", "sequence_reverse_kl")])
@pytest.mark.parametrize("shift", [None, 0.7], ids=["on-policy", "another-sampler"])
def test_local_targets_by_finite_differences_along_every_path(pair, target, shift):
    """Sum over completions of their probability times the divergences met on the way; prefixes are the sampler's."""
    pair = pair if shift is None else pair.with_sampler(shift)
    law_CV = (pair.student_logits_CV if shift is None else pair.sampler_logits_CV).softmax(-1)
    teacher_CV = pair.teacher_logits_CV.softmax(-1)
    reached = {}
    for path in walk(pair, law_CV):
        probability = torch.stack([law_CV[context, token] for token, context in path]).prod()
        for _, context in path:
            reached[context] = reached.get(context, 0) + probability

    def objective(logits_CV):
        student_CV = logits_CV.softmax(-1)
        return sum(share * divergence(target, student_CV[c], teacher_CV[c]) for c, share in reached.items())

    found = exact_gradient(pair, target, teacher_weight=0.3, skew=0.2)
    torch.testing.assert_close(found, numeric_gradient(objective, pair.student_logits_CV), rtol=1e-6, atol=1e-8)


def test_outcome_is_minus_the_expected_reward(pair):
    """By finite differences of a sum over all completions; the reward belongs to the completion as a whole."""
    ids_BT, mask_BT, _ = pair.completions()
    rewards = {tuple(ids[mask].tolist()): reward
               for ids, mask, reward in zip(ids_BT, mask_BT, pair.rewards().tolist(), strict=True)}  # fmt: skip

    def objective(logits_CV):
        student_CV = logits_CV.softmax(-1)
        return -sum(torch.stack([student_CV[c, token] for token, c in path]).prod() * rewards[tuple(t for t, _ in path)]
                    for path in walk(pair, logits_CV))  # fmt: skip

    assert set(rewards.values()) == {0.0, 1.0}
    numeric = numeric_gradient(objective, pair.student_logits_CV)
    torch.testing.assert_close(exact_gradient(pair, "outcome"), numeric, rtol=1e-6, atol=1e-9)


def test_moments_of_the_score_function_on_one_softmax():
    """With loss d log p, the gradient of token y is d_y (onehot_y - p): both moments by hand."""
    pair = TabularPair.random(4, 1, seed=7)
    p, q = (logits[0].softmax(-1) for logits in (pair.student_logits_CV, pair.teacher_logits_CV))
    gradients = (p / q).log()[:, None] * (torch.eye(4) - p)
    mean, second = p @ gradients, p @ gradients.square().sum(1)
    torch.testing.assert_close(expected_gradient(pair, build("token")), mean, rtol=0, atol=1e-14)
    assert second_moment(pair, build("token")) == pytest.approx(second.item(), abs=1e-14)
    assert trace_variance(pair, build("token")) == pytest.approx((second - mean @ mean).item(), abs=1e-14)


def test_exact_local_gradients_have_less_variance_than_sampled_ones(pair):
    assert trace_variance(pair, build("full_vocab")) < trace_variance(pair, build("token"))
    assert trace_variance(pair, build("token")) < trace_variance(pair, build("sequence"))


def test_verdict_of_an_unbiased_and_of_a_biased_estimator():
    good, bad = verify(build("token")), verify(build("teacher_topk", k=2))
    assert good.is_unbiased
    assert good.cosine == pytest.approx(1)
    assert not bad.is_unbiased
    assert bad.relative_bias > 1e-2


def test_verdict_without_a_target_still_says_what_happens_at_equal_models():
    verdict = verify(build("mix", terms={"token": 1, "sequence": 1}))
    assert (verdict.target, verdict.relative_bias, verdict.cosine, verdict.is_unbiased) == (None, None, None, None)
    assert verdict.rms_at_equal == 0
    assert verdict.trace_variance > 0


def test_declared_target_follows_the_chosen_divergence():
    assert declared_target(build("full_vocab")) == "reverse_kl"
    assert verify(build("full_vocab", divergence="jsd", teacher_weight=0.2)).is_unbiased


def test_models_are_larger_than_the_support():
    assert pair_for(build("teacher_topk", k=16)).student_logits_CV.shape[1] > 16
    assert not verify(build("teacher_topk", k=16)).is_unbiased


def test_a_loss_without_gradient_has_gradient_zero(pair):
    constant = build(lambda tokens: Estimate(tokens.teacher_logps_BT, tokens.teacher_logps_BT))
    verdict = verify(constant, pair, "reverse_kl")
    assert verdict.relative_bias == 1
    assert verdict.trace_variance == 0


def test_misuse_is_told(pair):
    with pytest.raises(ValueError, match="target must be one of"):
        exact_gradient(pair, "reverse")
    with pytest.raises(ValueError, match="one loss a position"):
        expected_gradient(pair, build(lambda tokens: Estimate(tokens.student_logps_BT.sum(), tokens.teacher_logps_BT)))
    with pytest.raises(ValueError, match="does not fit"):
        expected_gradient(pair, build("teacher_topk", k=7))
    reads_what_it_did_not_declare = build(lambda tokens: Estimate(tokens.kl_BT * tokens.student_logps_BT, tokens.kl_BT))
    with pytest.raises(TypeError, match="NoneType"):
        expected_gradient(pair, reads_what_it_did_not_declare)


# The mistakes that published code has made, each of which must turn the verdict around.


def right_return(tokens):
    d = log_ratio(tokens).masked_fill(~tokens.mask_BT, 0.0)
    return Estimate(return_to_go(d, 1.0) * tokens.student_logps_BT, d)


def sign_flip(tokens):
    estimate = right_return(tokens)
    return replace(estimate, loss_BT=-estimate.loss_BT)


def missing_detach(tokens):
    d = (tokens.student_logps_BT - tokens.teacher_logps_BT).masked_fill(~tokens.mask_BT, 0.0)
    return Estimate(return_to_go(d, 1.0) * tokens.student_logps_BT, d.detach())


def mask_leak(tokens):
    return Estimate(return_to_go(log_ratio(tokens), 1.0) * tokens.student_logps_BT, log_ratio(tokens))


def missing_last_token(tokens):
    d = log_ratio(tokens).masked_fill(~tokens.mask_BT, 0.0)
    d[:, -1] = 0
    return Estimate(return_to_go(d, 1.0) * tokens.student_logps_BT, d)


def test_the_right_return_is_right():
    verdict = verify(build(right_return), TabularPair.random(4, 3, seed=8, stop=True), "sequence_reverse_kl")
    assert verdict.is_unbiased


@pytest.mark.parametrize("mutant", [sign_flip, missing_detach, mask_leak, missing_last_token])
def test_a_wrong_return_is_caught(mutant):
    verdict = verify(build(mutant), TabularPair.random(4, 3, seed=8, stop=True), "sequence_reverse_kl")
    assert verdict.relative_bias > 1e-2


def test_missing_detach_is_caught_on_the_token_estimator():
    """d log p without a stop-gradient also differentiates d: it adds the gradient of minus the entropy."""

    def mutant(tokens):
        d = tokens.student_logps_BT - tokens.teacher_logps_BT
        return Estimate(d * tokens.student_logps_BT, d.detach())

    verdict = verify(build(mutant), TabularPair.random(4, 2, seed=8), "reverse_kl")
    assert not verdict.is_unbiased
    assert verdict.rms_at_equal > 1e-2


def test_absolute_discounting_is_caught():
    """Discounting by gamma^i instead of gamma^(i - t): at gamma = 0 only the first token would count."""
    pair = TabularPair.random(4, 3, seed=9, stop=True)

    def absolute(tokens, *, gamma):
        d = log_ratio(tokens).masked_fill(~tokens.mask_BT, 0.0)
        discounted = d * gamma ** torch.arange(d.shape[1], dtype=d.dtype)
        return Estimate(return_to_go(discounted, 1.0) * tokens.student_logps_BT, d)

    for gamma in (0.0, 0.5, 0.9):
        right = expected_gradient(pair, build("hybrid", gamma=gamma))
        assert (expected_gradient(pair, build(absolute, gamma=gamma)) - right).norm() > 1e-2
    assert verify(build(absolute, gamma=1.0), pair, "sequence_reverse_kl").is_unbiased  # where the two agree
    assert not verify(build(absolute, gamma=0.0), pair, "reverse_kl").is_unbiased
    assert verify(build("hybrid", gamma=0.0), pair, "reverse_kl").is_unbiased


def test_a_dropped_tail_is_caught():
    """The exact head over the teacher's top K, and the score function for samples outside: both are needed."""

    def head(tokens):
        student, teacher = tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK
        return (student.exp().detach() * (student - teacher).detach() * student).sum(-1)

    def with_tail(tokens, *, k):
        outside = (tokens.support_ids_BTK != tokens.completion_ids_BT[..., None]).all(-1)
        loss = head(tokens) + torch.where(outside, score_function(tokens).loss_BT, 0.0)
        return Estimate(loss, log_ratio(tokens))

    def without_tail(tokens, *, k):
        return Estimate(head(tokens), log_ratio(tokens))

    def tail_everywhere(tokens, *, k):
        return Estimate(head(tokens) + score_function(tokens).loss_BT, log_ratio(tokens))

    pair = TabularPair.random(4, 3, seed=8, stop=True)
    right, dropped, doubled = (
        verify(replace(made(fn, "support"), kwargs={"k": 2}), pair, "reverse_kl")
        for fn in (with_tail, without_tail, tail_everywhere)
    )
    assert right.is_unbiased
    assert dropped.relative_bias > 1e-2
    assert doubled.relative_bias > 1e-2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", ["reverse_kl", "forward_kl", "tvd"])
def test_a_sign_flip_is_caught_in_a_divergence(target, sign):
    """The loss is written by the mathematics of this file, so that the oracle is asked and not quoted."""

    def signed(tokens):
        p, q = tokens.student_full_logps_BTV.exp(), tokens.teacher_full_logps_BTV.exp()
        loss = divergence(target, p.unbind(-1), q.unbind(-1))
        return Estimate(sign * loss, log_ratio(tokens))

    verdict = verify(made(signed, "full"), TabularPair.random(4, 3, seed=8, stop=True), target)
    assert verdict.cosine == pytest.approx(sign)
    assert verdict.relative_bias == pytest.approx(1 - sign, abs=1e-12)
