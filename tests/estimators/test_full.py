"""Full-vocabulary divergences against plain loops, their bounds, and the names they are found by."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import close, kl, normal_logits, slopes, softmax

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trace_variance, verify
from lit_opd.types import TokenBatch

fast = settings(max_examples=60, deadline=None)


def mixture(a, b, share):
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def jsd(p, q, w):
    m = mixture(q, p, w)
    return kl(p, m) / w + kl(q, m) / (1 - w)


# Name, keywords and the value of student p and teacher q, by the definitions.
FORMULAS = [
    ("full_vocab", {}, lambda p, q: kl(p, q)),
    ("full_vocab", {"divergence": "forward_kl"}, lambda p, q: kl(q, p)),
    ("full_vocab", {"divergence": "jsd"}, lambda p, q: jsd(p, q, 0.5)),
    ("full_vocab", {"divergence": "jsd", "teacher_weight": 0.1}, lambda p, q: jsd(p, q, 0.1)),
    ("full_vocab", {"divergence": "tvd"}, lambda p, q: sum(map(abs, (x - y for x, y in zip(p, q, strict=True)))) / 2),
    ("full_vocab", {"divergence": "skew_reverse_kl"}, lambda p, q: kl(p, mixture(p, q, 0.1))),
    ("full_vocab", {"divergence": "skew_forward_kl", "skew": 0.6}, lambda p, q: kl(q, mixture(q, p, 0.6))),
    ("tvd", {}, lambda p, q: sum(map(abs, (x - y for x, y in zip(p, q, strict=True)))) / 2),
    ("distillm", {}, lambda p, q: kl(p, mixture(p, q, 0.1))),
    ("distillm", {"divergence": "skew_forward_kl", "skew": 0.3}, lambda p, q: kl(q, mixture(q, p, 0.3))),
    ("mixed_kl", {}, lambda p, q: (kl(p, q) + kl(q, p)) / 2),
    ("mixed_kl", {"forward_weight": 0.9}, lambda p, q: 0.9 * kl(q, p) + 0.1 * kl(p, q)),
    ("mixed_kl", {"forward_weight": 0.0}, lambda p, q: kl(p, q)),
    ("mixed_kl", {"forward_weight": 1.0}, lambda p, q: kl(q, p)),
]


def label(value):
    return "" if callable(value) else value if isinstance(value, str) else "-".join(map(str, value.values()))


every_formula = pytest.mark.parametrize(("name", "keywords", "formula"), FORMULAS, ids=label)


def evaluate(estimator, logits, teacher_logits):
    """Loss, its gradient by the student's logits, and the KL estimate; the sampled tokens play no part."""
    student, teacher, nothing = logits.log_softmax(-1), teacher_logits.log_softmax(-1), torch.full((len(logits),), 7.0)
    tokens = TokenBatch(nothing, -nothing, nothing, nothing > 0, student_full_logps_BTV=student,
                        teacher_full_logps_BTV=teacher)  # fmt: skip
    estimate = estimator(tokens)
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), logits)
    return estimate.loss_BT.detach(), gradient, estimate.kl_BT


@every_formula
def test_value_gradient_and_logged_kl_are_those_of_a_loop(name, keywords, formula):
    logits, teacher = normal_logits()
    loss, gradient, logged = evaluate(build(name, **keywords), logits, teacher)
    for row in range(len(logits)):
        z, q = logits[row].tolist(), softmax(teacher[row].tolist())
        close(loss[row], formula(softmax(z), q))
        close(gradient[row], slopes(lambda z, q=q: formula(softmax(z), q), z), atol=1e-8)
        close(logged[row], kl(softmax(z), q))


@pytest.mark.parametrize(
    ("keywords", "target"),
    [({"divergence": "jsd", "teacher_weight": 0.0}, "forward_kl"), ({"divergence": "jsd", "teacher_weight": 1.0},
      "reverse_kl"), ({"divergence": "skew_reverse_kl", "skew": 0.0}, "reverse_kl"),
     ({"divergence": "skew_forward_kl", "skew": 0.0}, "forward_kl")],
    ids=str,
)  # fmt: skip
def test_at_the_ends_of_a_family_stand_the_kls_and_the_contract_holds(keywords, target):
    pair, estimator = TabularPair.random(5, 2, seed=1), build("full_vocab", **keywords)
    close(expected_gradient(pair, estimator), exact_gradient(pair, target))
    assert estimator.contract.unbiased
    assert verify(estimator, pair).is_unbiased


def test_the_gradient_of_a_mixed_kl_lies_on_the_line_between_both():
    pair = TabularPair.random(5, 2, seed=2)
    found = expected_gradient(pair, build("mixed_kl", forward_weight=0.3))
    close(found, 0.3 * exact_gradient(pair, "forward_kl") + 0.7 * exact_gradient(pair, "reverse_kl"))


@pytest.mark.parametrize("forward_weight", [0.0, 0.3, 1.0])
def test_only_the_ends_of_a_mixed_kl_claim_a_target(forward_weight):
    target = {0.0: "reverse_kl", 1.0: "forward_kl"}.get(forward_weight)
    assert build("mixed_kl", forward_weight=forward_weight).contract.target == target


logit_lists = st.lists(st.floats(-30, 30), min_size=5, max_size=5)


@fast
@given(logit_lists, logit_lists)
def test_the_pull_of_the_tvd_on_a_logit_is_at_most_p_times_one_minus_p(student, teacher):
    logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    loss, gradient, _ = evaluate(build("tvd"), logits, torch.tensor([teacher], dtype=torch.float64))
    p = logits.detach().softmax(-1)
    assert (gradient.abs() <= p * (1 - p) + 1e-14).all()
    assert 0 <= loss <= 1 + 1e-14


def test_the_pull_of_the_tvd_does_not_fade_on_the_way_to_the_teacher():
    logits, _ = normal_logits()
    direction = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5, 0.2]).double()
    near, nearer = (evaluate(build("tvd"), logits, logits.detach() + s * direction)[1] for s in (1e-3, 1e-6))
    assert nearer.norm() > 0.99 * near.norm()


@fast
@given(logit_lists, logit_lists, st.floats(0.01, 0.99), st.sampled_from(["skew_reverse_kl", "skew_forward_kl"]))
def test_a_skew_kl_is_at_most_minus_the_log_of_the_share(student, teacher, skew, divergence):
    logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    estimator = build("distillm", divergence=divergence, skew=skew)
    loss, _, _ = evaluate(estimator, logits, torch.tensor([teacher], dtype=torch.float64))
    assert -1e-12 <= loss <= -math.log(skew) + 1e-12


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("full_vocab", {"divergence": "forward_kl"}), ("full_vocab", {"divergence": "jsd"}), ("tvd", {}),
     ("distillm", {}), ("distillm", {"divergence": "skew_forward_kl"}), ("mixed_kl", {"forward_weight": 1.0})],
    ids=str,
)  # fmt: skip
def test_bounded_forms_learn_where_the_teacher_cannot_write_and_the_logged_kl_says_so(name, keywords):
    logits, teacher = normal_logits()
    teacher[:, 2] = -torch.inf
    loss, gradient, logged = evaluate(build(name, **keywords), logits, teacher)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert (logged == torch.inf).all()


@every_formula
def test_log_ratios_of_sixty_stay_finite_in_fp32(name, keywords, formula):
    logits = torch.tensor([[60.0, 0.0, -60.0], [0.0, 0.0, 60.0]], requires_grad=True)
    loss, gradient, logged = evaluate(build(name, **keywords), logits, torch.tensor([[-60.0, 0.0, 60.0]] * 2))
    assert all(torch.isfinite(x).all() for x in (loss, gradient, logged))


@every_formula
def test_bf16_log_probs_lose_nothing_but_their_own_rounding(name, keywords, formula):
    logits, teacher = normal_logits()
    student, teacher = (x.detach().log_softmax(-1).bfloat16() for x in (logits, teacher))
    nothing = torch.zeros(3)
    found, exact = (
        build(name, **keywords)(TokenBatch(nothing, nothing, nothing, nothing == 0, student_full_logps_BTV=p,
                                           teacher_full_logps_BTV=q)).loss_BT
        for p, q in ((student, teacher), (student.double(), teacher.double()))
    )  # fmt: skip
    assert found.dtype == torch.float32
    close(found, exact, atol=1e-5)


@every_formula
def test_no_sample_adds_noise_to_a_position(name, keywords, formula):
    assert trace_variance(TabularPair.random(4, 1, seed=3), build(name, **keywords)) < 1e-28


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("full_vocab", {"divergence": "kl"}, "divergence must be one of reverse_kl, forward_kl, jsd, tvd, "
      "skew_reverse_kl, skew_forward_kl, found 'kl'"),
     ("full_vocab", {"teacher_weight": -0.1}, r"teacher_weight must lie in \[0, 1\], found -0.1"),
     ("full_vocab", {"skew": 1.0}, r"skew must lie in \[0, 1\), found 1.0"),
     ("distillm", {"skew": -0.1}, r"skew must lie in \[0, 1\), found -0.1"),
     ("distillm", {"skew": float("nan")}, r"skew must lie in \[0, 1\), found nan"),
     ("distillm", {"divergence": "jsd"}, "divergence must be one of skew_reverse_kl, skew_forward_kl, found 'jsd'"),
     ("mixed_kl", {"forward_weight": 1.1}, r"forward_weight must lie in \[0, 1\], found 1.1"),
     ("tvd", {"skew": 0.1}, "estimator.kwargs.skew: expected a keyword of tvd")],
)  # fmt: skip
def test_refuses_keywords_that_cannot_work(name, keywords, message):
    with pytest.raises(UserError, match=message):
        build(name, **keywords)
