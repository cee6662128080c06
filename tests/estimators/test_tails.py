"""Score functions on a support: against plain loops over tokens, by their identities, and by their variance."""

import math
from dataclasses import replace

import pytest
import torch
from references import close, softmax, support_by_sets

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trace_variance, verify
from lit_opd.functional import SUPPORTS, choose_support
from lit_opd.types import Estimate, Need, TokenBatch

every_support = pytest.mark.parametrize("support", SUPPORTS)
VOCABULARY = 6


def normal_logits():
    """Four pairs of distributions, each at one position for every token that may be sampled there."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(2, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    student, teacher = logits.repeat_interleave(VOCABULARY, dim=1)
    return student.requires_grad_(), teacher


def batch(estimator, logits_NV, teacher_logits_NV, ids_N):
    student, teacher = logits_NV.log_softmax(-1), teacher_logits_NV.log_softmax(-1)
    ids, mask = choose_support(student.detach(), teacher, estimator.support_size, estimator.support)
    student_N, teacher_N = (x.gather(-1, ids_N[:, None]).squeeze(-1) for x in (student, teacher))
    entropy_N = -(teacher.exp() * teacher.clamp(min=-1e9)).sum(-1)
    return TokenBatch(
        student_N, teacher_N, student_N.detach(), torch.ones_like(ids_N, dtype=torch.bool), completion_ids_BT=ids_N,
        support_ids_BTK=ids, support_mask_BTK=mask, student_support_logps_BTK=student.gather(-1, ids),
        teacher_support_logps_BTK=teacher.gather(-1, ids), teacher_entropy_BT=entropy_N,
    )  # fmt: skip


def evaluate(estimator, logits, teacher_logits, ids=None):
    """Loss, its gradient by the student's logits, and the KL estimate; by default, token after token was sampled."""
    ids = torch.arange(len(logits)) % VOCABULARY if ids is None else ids
    estimate = estimator(batch(estimator, logits, teacher_logits, ids))
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), logits)
    return estimate.loss_BT.detach(), gradient, estimate.kl_BT


def pull(p, credits):
    """Gradient by the logits of the sum over tokens of credit x log p, from {token: credit}."""
    return [credits.get(i, 0.0) - p[i] * math.fsum(credits.values()) for i in range(len(p))]


def rows(logits, teacher, support, k=3):
    """For each position: its number, the sampled token, p, q, the log-ratios and the support."""
    for row in range(len(logits)):
        student_z, teacher_z = logits[row].tolist(), teacher[row].tolist()
        p, q = softmax(student_z), softmax(teacher_z)
        d = [math.log(a / b) for a, b in zip(p, q, strict=True)]
        yield row, row % VOCABULARY, p, q, d, support_by_sets(student_z, teacher_z, k, support)


def with_support(fn, **keywords):
    estimator = build(fn, **keywords)
    return replace(estimator, spec=replace(estimator.spec, needs=frozenset({Need.SUPPORT})))


@every_support
@pytest.mark.parametrize(
    ("name", "keywords", "through_head", "on_tail"),
    [("head_and_tail", {}, 0, 0), ("head_and_tail_published", {}, 1, 0),
     ("head_and_tail_published", {"corrected": True}, 1, 1)],
    ids=["detached", "published", "corrected"],
)  # fmt: skip
def test_head_and_tail_are_those_of_a_loop(name, keywords, through_head, on_tail, support):
    logits, teacher = normal_logits()
    _, gradient, kl = evaluate(build(name, k=3, support=support, **keywords), logits, teacher)
    sampled_outside = 0
    for row, y, p, _, d, tokens in rows(logits, teacher, support):
        credits = {i: p[i] * (d[i] + through_head) for i in tokens}
        value = math.fsum(p[i] * d[i] for i in tokens)
        if y not in tokens:
            sampled_outside += 1
            credits[y] = d[y] + on_tail
            value += d[y]
        close(gradient[row], pull(p, credits))
        close(kl[row], value)
    assert 0 < sampled_outside < len(logits)


@every_support
def test_resopd_is_that_of_a_loop(support):
    logits, teacher = normal_logits()
    _, gradient, kl = evaluate(build("resopd", k=3, support=support), logits, teacher)
    sampled_outside = 0
    for row, y, p, q, d, tokens in rows(logits, teacher, support):
        p_outside, q_outside = (1 - math.fsum(x[i] for i in tokens) for x in (p, q))
        bucket = math.log(p_outside / q_outside)
        # Of (1 - P) b the derivative by log p_i is -p_i (b + 1), and of p_i d_i it is p_i (d_i + 1).
        credits = {i: p[i] * (d[i] - bucket) for i in tokens}
        value = math.fsum(p[i] * d[i] for i in tokens) + p_outside * bucket
        if y not in tokens:
            sampled_outside += 1
            credits[y] = math.log(p[y] / p_outside) - math.log(q[y] / q_outside)
            value += credits[y]
        close(gradient[row], pull(p, credits))
        close(kl[row], value)
    assert 0 < sampled_outside < len(logits)


@every_support
@pytest.mark.parametrize("weights", ["student", "teacher", "none"])
def test_weighted_scores_are_those_of_a_loop(weights, support):
    logits, teacher = normal_logits()
    estimator = build("topk_weighted_scores", k=3, support=support, weights=weights)
    _, gradient, kl = evaluate(estimator, logits, teacher)
    for row, y, p, q, d, tokens in rows(logits, teacher, support):
        of = {"student": p, "teacher": q, "none": [1.0] * len(p)}[weights]
        total = math.fsum(of[i] for i in tokens) if weights != "none" else 1.0
        close(gradient[row], pull(p, {i: of[i] / total * d[i] for i in tokens}))
        close(kl[row], d[y])


@pytest.mark.parametrize("threshold", [0.0, 1.0, 9.0])
def test_entropy_aware_adds_the_forward_kl_where_the_teacher_hesitates(threshold):
    logits, teacher = normal_logits()
    loss, gradient, kl = evaluate(build("entropy_aware", k=3, entropy_threshold=threshold), logits, teacher)
    hesitant = 0
    for row, y, p, q, d, tokens in rows(logits, teacher, "teacher"):
        credits, value = {y: d[y]}, d[y] * math.log(p[y])
        if -math.fsum(x * math.log(x) for x in q) > threshold:
            hesitant += 1
            p_mass, q_mass = (math.fsum(x[i] for i in tokens) for x in (p, q))
            value += math.fsum(q[i] / q_mass * math.log(q[i] / q_mass / (p[i] / p_mass)) for i in tokens)
            # The forward KL's gradient on its tokens is p' - q', renormalised; it sums to zero.
            for i in tokens:
                credits[i] = credits.get(i, 0.0) + p[i] / p_mass - q[i] / q_mass
        close(loss[row], value)
        close(gradient[row], pull(p, credits))
        close(kl[row], d[y])
    assert hesitant == {0.0: len(logits), 9.0: 0}.get(threshold, hesitant)
    assert threshold != 1.0 or 0 < hesitant < len(logits)


def test_the_threshold_is_not_rounded_to_bf16():
    """0.8 in bf16 is 0.8008."""
    logits, teacher = normal_logits()
    estimator = build("entropy_aware", k=3, entropy_threshold=0.8)
    tokens = batch(estimator, logits, teacher, torch.zeros(len(logits), dtype=torch.long))
    low = estimator(replace(tokens, teacher_entropy_BT=torch.full((len(logits),), 0.8).bfloat16()))
    high = estimator(replace(tokens, teacher_entropy_BT=torch.ones(len(logits))))
    assert torch.equal(low.loss_BT, high.loss_BT)


@every_support
def test_detached_and_corrected_are_unbiased_and_published_is_off_by_the_gradient_of_the_mass(support):
    pair = TabularPair.random(6, 2, seed=1, stop=True)
    target = exact_gradient(pair, "reverse_kl")

    def mass(tokens, *, k, support):
        value = torch.where(tokens.support_mask_BTK, tokens.student_support_logps_BTK.exp(), 0.0).sum(-1)
        return Estimate(value, tokens.teacher_logps_BT)

    of_mass = with_support(mass, k=2, support=support)
    published = expected_gradient(pair, build("head_and_tail_published", k=2, support=support))
    assert expected_gradient(pair, of_mass).norm() > 1e-2
    close(published, target + expected_gradient(pair, of_mass))
    for name, keywords in (("head_and_tail", {}), ("head_and_tail_published", {"corrected": True}), ("resopd", {})):
        close(expected_gradient(pair, build(name, k=2, support=support, **keywords)), target)


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_weighted_by_the_student_it_is_the_renormalised_kl_and_its_level_on_the_log_mass(support):
    """I11; an intersection may be empty, and the logarithm of no mass is no number."""
    pair = TabularPair.random(6, 2, seed=3)

    def level(tokens, *, k, support):
        log_p, log_q = tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK
        log_p = log_p.masked_fill(~tokens.support_mask_BTK, -torch.inf)
        log_mass = log_p.logsumexp(-1)
        mean = (torch.exp(log_p - log_mass[..., None]) * (log_p - log_q).masked_fill(~tokens.support_mask_BTK, 0)).sum(
            -1
        )
        return Estimate(mean.detach() * log_mass, tokens.teacher_logps_BT)

    renormalised = build("topk_divergence", k=2, support=support)
    expected = expected_gradient(pair, renormalised) + expected_gradient(
        pair, with_support(level, k=2, support=support)
    )
    close(expected_gradient(pair, build("topk_weighted_scores", k=2, support=support)), expected)


def test_detaching_the_head_has_the_least_variance():
    pair = TabularPair.random(10, 1, seed=4)
    plain = trace_variance(pair, build("token"))
    detached, corrected = (
        trace_variance(pair, build(name, k=4, support="student", **keywords))
        for name, keywords in (("head_and_tail", {}), ("head_and_tail_published", {"corrected": True}))
    )
    assert detached < 0.6 * plain
    assert detached < corrected


def test_on_the_teachers_support_resopd_has_less_variance_than_head_and_tail():
    """The bucket is exact. On the student's support b, most often negative, shrinks what `head_and_tail` samples."""
    pairs = [TabularPair.random(12, 1, seed=seed) for seed in range(9)]
    ratio = {
        support: [trace_variance(pair, build("resopd", k=4, support=support))
                  / trace_variance(pair, build("head_and_tail", k=4, support=support)) for pair in pairs]
        for support in ("teacher", "student")
    }  # fmt: skip
    assert max(ratio["teacher"]) < 1
    assert sorted(ratio["teacher"])[4] < 0.7
    assert sorted(ratio["student"])[4] > 1


def test_a_rounded_mass_outside_costs_resopd_no_bias():
    """The teacher's tail holds e^-60, which 1 - Q cannot tell from nothing."""
    generator = torch.Generator().manual_seed(1)
    student_CV, teacher_CV = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
    teacher_CV[:, 2:] -= 60
    pair = TabularPair(student_CV, teacher_CV, horizon=1)
    assert verify(build("resopd", k=2), pair).is_unbiased
    assert verify(build("topk_tail_reverse_kl", k=2), pair).relative_bias > 0.1


@pytest.mark.parametrize("name", ["head_and_tail", "resopd"])
def test_from_another_sampler_a_sampled_tail_is_biased(name):
    pair = TabularPair.random(6, 1, seed=5)
    estimator = build(name, k=2)
    assert estimator.spec.on_policy
    assert verify(estimator, pair).is_unbiased
    assert verify(estimator, pair.with_sampler(0.5)).relative_bias > 1e-2


@pytest.mark.parametrize("weights", ["student", "teacher", "none"])
def test_a_token_neither_side_can_write_has_no_score(weights):
    """Both top K reach into the impossible where fewer tokens are possible."""
    logits, teacher = (torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]]).double() * scale for scale in (1.0, 2.0))
    estimator = build("topk_weighted_scores", k=3, weights=weights)
    tokens = batch(estimator, logits, teacher, torch.tensor([0]))
    leaf = tokens.student_support_logps_BTK.clone().requires_grad_()
    estimate = estimator(TokenBatch(**{**vars(tokens), "student_support_logps_BTK": leaf}))
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), leaf)
    assert torch.isfinite(estimate.loss_BT).all()
    assert torch.isfinite(gradient).all()
    assert gradient[0, 2] == 0


def test_tokens_only_the_student_can_write_have_no_score_by_the_teacher():
    logits = torch.tensor([[1.0, 0.0, 2.0]]).double().requires_grad_()
    teacher = torch.tensor([[1.0, 0.5, -torch.inf]]).double()
    estimator = build("topk_weighted_scores", k=3, weights="teacher")
    loss, gradient, _ = evaluate(estimator, logits, teacher, torch.tensor([0]))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("topk_weighted_scores", {"weights": "both"}, "weights must be one of student, teacher, none, found 'both'"),
     ("topk_weighted_scores", {"k": 0}, "k must be a whole number of at least 1, found 0"),
     ("head_and_tail", {"k": 0}, "k must be a whole number of at least 1, found 0"),
     ("head_and_tail", {"support": "both"}, "estimator.kwargs.support: expected one of"),
     ("resopd", {"k": 0}, "k must be a whole number of at least 1, found 0"),
     ("resopd", {"support": "both"}, "estimator.kwargs.support: expected one of"),
     ("head_and_tail_published", {"k": 1.5}, "k must be a whole number of at least 1, found 1.5"),
     ("entropy_aware", {"k": 0, "mass": "tail"}, "k must be a whole number of at least 1, found 0"),
     ("entropy_aware", {"entropy_threshold": -0.1}, "entropy_threshold must be at least 0, found -0.1"),
     ("entropy_aware", {"entropy_threshold": float("nan")}, "entropy_threshold must be at least 0, found nan"),
     ("entropy_aware", {"mass": "all"}, "mass must be one of truncate, renormalise, tail, generalised, found 'all'")],
)  # fmt: skip
def test_refuses_keywords_that_cannot_work(name, keywords, message):
    with pytest.raises(UserError, match=message):
        build(name, **keywords)
