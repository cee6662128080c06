"""Estimators whose weights follow the models: against plain loops in which the weights stand still."""

import math

import pytest
import torch
from references import close, kl, normal_logits, slopes, softmax

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, verify
from lit_opd.types import TokenBatch

CASES = [
    ("adaptive_kl", {}), ("adaptive_kl", {"head_mass": 0.9}), ("adaptive_kl", {"head_mass": 1.0}), ("todi", {}),
    ("logit_matching", {}), ("logit_matching", {"weighting": "student"}), ("logit_matching", {"weighting": "uniform"}),
]  # fmt: skip
every_case = pytest.mark.parametrize(("name", "keywords"), CASES, ids=str)


def adaptive_kl(p, q, head_mass):
    """The value as a function of p, with the weights taken at the given p."""
    head, mass = set(), 0.0
    for token in sorted(range(len(q)), key=lambda token: -q[token]):
        if mass < head_mass - 1e-12:
            head.add(token)
            mass += q[token]
    gap = [abs(x - y) for x, y in zip(p, q, strict=True)]
    share = math.fsum(gap[i] for i in head) / math.fsum(gap)
    return lambda p: share * kl(q, p) + (1 - share) * kl(p, q)


def todi(p, q):
    switch = [y / (x + y) for x, y in zip(p, q, strict=True)]

    def value(p):
        terms = zip(p, q, switch, strict=True)
        return math.fsum(a * y * math.log(y / x) + (1 - a) * x * math.log(x / y) for x, y, a in terms)

    return value


def logit_matching(p, q, weighting):
    weights = {"student": p, "teacher": q, "uniform": [1 / len(p)] * len(p)}[weighting]

    def value(p):
        gap = [math.log(x / y) for x, y in zip(p, q, strict=True)]
        mean = math.fsum(w * g for w, g in zip(weights, gap, strict=True))
        return math.fsum(w * (g - mean) ** 2 for w, g in zip(weights, gap, strict=True)) / 2

    return value


LOOPS = {
    "adaptive_kl": lambda p, q, head_mass=0.5: adaptive_kl(p, q, head_mass),
    "todi": todi,
    "logit_matching": lambda p, q, weighting="teacher": logit_matching(p, q, weighting),
}


def estimate_of(estimator, student, teacher):
    nothing = torch.full((len(student),), 7.0)
    return estimator(TokenBatch(nothing, -nothing, nothing, nothing > 0, student_full_logps_BTV=student,
                                teacher_full_logps_BTV=teacher))  # fmt: skip


def evaluate(estimator, logits, teacher_logits):
    estimate = estimate_of(estimator, logits.log_softmax(-1), teacher_logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), logits)
    return estimate.loss_BT.detach(), gradient, estimate.kl_BT


@every_case
def test_value_gradient_and_logged_kl_are_those_of_a_loop_with_weights_held_fixed(name, keywords):
    logits, teacher = normal_logits()
    loss, gradient, logged = evaluate(build(name, **keywords), logits, teacher)
    for row in range(len(logits)):
        z, q = logits[row].tolist(), softmax(teacher[row].tolist())
        value = LOOPS[name](softmax(z), q, **keywords)
        close(loss[row], value(softmax(z)))
        close(gradient[row], slopes(lambda z, value=value: value(softmax(z)), z), atol=1e-8)
        close(logged[row], kl(softmax(z), q))


def test_logit_matching_weighed_by_the_student_is_the_reverse_kl():
    pair = TabularPair.random(6, 2, seed=1)
    found = expected_gradient(pair, build("logit_matching", weighting="student"))
    close(found, exact_gradient(pair, "reverse_kl"))


@pytest.mark.parametrize("target", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize(("name", "keywords"), [case for case in CASES if case[1] != {"weighting": "student"}], ids=str)
def test_the_others_claim_no_target_and_have_none_of_the_known(name, keywords, target):
    estimator = build(name, **keywords)
    assert estimator.contract.target is None
    if keywords != {"head_mass": 1.0}:
        assert verify(estimator, TabularPair.random(6, 1, seed=2), target).relative_bias > 1e-2


def test_with_the_whole_mass_as_head_the_adaptive_kl_is_the_forward_kl():
    pair = TabularPair.random(6, 1, seed=2)
    assert verify(build("adaptive_kl", head_mass=1.0), pair, "forward_kl").is_unbiased


def test_a_forgotten_token_is_pulled_by_logit_matching_as_hard_as_the_teacher_likes_it():
    """At p = 1e-13 the reverse KL has lost it."""
    logits = torch.tensor([[0.0, -30.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    _, matched, _ = evaluate(build("logit_matching"), logits, teacher)
    _, reverse, _ = evaluate(build("full_vocab"), logits, teacher)
    close(matched, [[7.5, -7.5]], atol=1e-9)
    assert reverse.abs().max() < 1e-10


def test_logit_matching_learns_where_the_teacher_cannot_write():
    logits, teacher = normal_logits()
    teacher[:, 2] = -torch.inf
    for weighting in ("student", "teacher", "uniform"):
        loss, gradient, logged = evaluate(build("logit_matching", weighting=weighting), logits, teacher)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
        assert (logged == torch.inf).all()


@every_case
def test_the_logged_kl_is_never_nan(name, keywords):
    logits, teacher = normal_logits()
    with torch.no_grad():
        logits[0, 2] = -torch.inf
    teacher[:2, 2] = -torch.inf
    logged = evaluate(build(name, **keywords), logits, teacher)[2]
    assert torch.isfinite(logged[0])
    assert logged[1] == torch.inf


@every_case
def test_log_ratios_of_sixty_stay_finite_in_fp32(name, keywords):
    logits = torch.tensor([[60.0, 0.0, -60.0], [0.0, 0.0, 60.0]], requires_grad=True)
    loss, gradient, logged = evaluate(build(name, **keywords), logits, torch.tensor([[-60.0, 0.0, 60.0]] * 2))
    assert all(torch.isfinite(x).all() for x in (loss, gradient, logged))


@every_case
def test_bf16_log_probs_lose_nothing_but_their_own_rounding(name, keywords):
    student, teacher = (x.detach().log_softmax(-1).bfloat16() for x in normal_logits())
    found = estimate_of(build(name, **keywords), student, teacher).loss_BT
    assert found.dtype == torch.float32
    close(found, estimate_of(build(name, **keywords), student.double(), teacher.double()).loss_BT, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("adaptive_kl", {"head_mass": 0.0}, r"head_mass must lie in \(0, 1\], found 0.0"),
     ("adaptive_kl", {"head_mass": 1.1}, r"head_mass must lie in \(0, 1\], found 1.1"),
     ("logit_matching", {"weighting": "both"}, "weighting must be one of student, teacher, uniform, found 'both'"),
     ("todi", {"head_mass": 0.5}, "estimator.kwargs.head_mass: expected a keyword of todi")],
)  # fmt: skip
def test_refuses_keywords_that_cannot_work(name, keywords, message):
    with pytest.raises(UserError, match=message):
        build(name, **keywords)
