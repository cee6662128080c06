"""Top-K divergences: against plain loops, at the ends of K, and what each does to the mass of its support."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import close, normal_logits, slopes, softmax, support_by_sets

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, verify
from lit_opd.functional import MASSES, SUPPORT_DIVERGENCES, SUPPORTS, choose_support
from lit_opd.types import TokenBatch

fast = settings(max_examples=40, deadline=None)
every_support = pytest.mark.parametrize("support", SUPPORTS)

NAMED = {
    "teacher_topk": ("teacher", "reverse_kl", "renormalise"),
    "student_topk": ("student", "reverse_kl", "tail"),
    "union_topk": ("union", "reverse_kl", "renormalise"),
    "topk_truncated_reverse_kl": (None, "reverse_kl", "truncate"),
    "topk_generalised_reverse_kl": (None, "reverse_kl", "generalised"),
    "topk_tail_reverse_kl": (None, "reverse_kl", "tail"),
    "topk_tail_forward_kl": (None, "forward_kl", "tail"),
    "topk_truncated_forward_kl": (None, "forward_kl", "truncate"),
}
# A name with keywords, and the parts it is made of: support, divergence, mass.
PUBLISHED = [
    (name, {} if own else {"support": support}, (own or support, divergence, mass))
    for name, (own, divergence, mass) in NAMED.items()
    for support in (SUPPORTS if own is None else [own])
]
GENERAL = [
    ("topk_divergence", {"support": support, "divergence": divergence, "mass": mass}, (support, divergence, mass))
    for support, divergence, mass in product(SUPPORTS, SUPPORT_DIVERGENCES, MASSES)
]


def label(value):
    return "-".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else ""


every_form = pytest.mark.parametrize(("name", "keywords", "parts"), PUBLISHED + GENERAL, ids=label)


def batch(estimator, logits_NV, teacher_logits_NV, ids_N=None):
    """What the estimator sees of positions with these logits; by default, the sampled token is token 0."""
    student, teacher = logits_NV.log_softmax(-1), teacher_logits_NV.log_softmax(-1)
    ids_N = torch.zeros(len(student), dtype=torch.long) if ids_N is None else ids_N
    ids, mask = choose_support(student.detach(), teacher, estimator.support_size, estimator.support)
    student_N, teacher_N = (x.gather(-1, ids_N[:, None]).squeeze(-1) for x in (student, teacher))
    return TokenBatch(
        student_N, teacher_N, student_N.detach(), torch.ones_like(ids_N, dtype=torch.bool), completion_ids_BT=ids_N,
        support_ids_BTK=ids, support_mask_BTK=mask, student_support_logps_BTK=student.gather(-1, ids),
        teacher_support_logps_BTK=teacher.gather(-1, ids),
    )  # fmt: skip


def evaluate(estimator, logits, teacher_logits, ids=None):
    """Loss, its gradient by the student's logits, and the KL estimate."""
    estimate = estimator(batch(estimator, logits, teacher_logits, ids))
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), logits)
    return estimate.loss_BT.detach(), gradient, estimate.kl_BT


def value_by_loop(student_logits, teacher_logits, support, divergence, mass, w=0.5):
    """By the definitions, from lists of logits and the tokens of the support."""
    p, q = ([softmax(logits)[token] for token in support] for logits in (student_logits, teacher_logits))
    if not support:
        return 0.0
    if mass == "renormalise":
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    if mass == "tail":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    correction = mass == "generalised"

    def kl(a, b):
        return math.fsum(x * math.log(x / y) + correction * (y - x) for x, y in zip(a, b, strict=True))

    if divergence != "jsd":
        return kl(p, q) if divergence == "reverse_kl" else kl(q, p)
    m = [w * y + (1 - w) * x for x, y in zip(p, q, strict=True)]
    return kl(p, m) / w + kl(q, m) / (1 - w)


@every_form
def test_value_and_gradient_are_those_of_a_loop(name, keywords, parts):
    support, divergence, mass = parts
    logits, teacher = normal_logits(vocabulary=7)
    loss, gradient, _ = evaluate(build(name, k=3, **keywords), logits, teacher)
    for row in range(len(logits)):
        p, q = logits[row].tolist(), teacher[row].tolist()
        tokens = support_by_sets(p, q, 3, support)
        close(loss[row], value_by_loop(p, q, tokens, divergence, mass))
        numeric = slopes(lambda z, q=q, s=tokens: value_by_loop(z, q, s, divergence, mass), p)  # noqa: B023
        close(gradient[row], numeric, atol=1e-8)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_the_jsd_takes_its_weight(weight):
    logits, teacher = normal_logits(vocabulary=7)
    estimator = build("topk_divergence", k=3, divergence="jsd", mass="tail", teacher_weight=weight)
    loss, _, _ = evaluate(estimator, logits, teacher)
    for row in range(len(logits)):
        p, q = logits[row].tolist(), teacher[row].tolist()
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(weight, "jsd")
        close(loss[row], value_by_loop(p, q, support_by_sets(p, q, 3, "teacher"), divergence, "tail", weight))


@every_form
def test_the_contract_holds_on_a_larger_vocabulary(name, keywords, parts):
    estimator = build(name, k=2, **keywords)
    target, unbiased, at_equal = estimator.contract
    verdict = verify(estimator, TabularPair.random(7, 2, seed=3))
    assert target == parts[1]
    assert not unbiased
    assert verdict.relative_bias > 1e-3
    assert (verdict.norm_at_equal < 1e-14) == (at_equal != "never")
    assert (verdict.rms_at_equal < 1e-14) == (at_equal == "sample")


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("mass", MASSES)
def test_at_its_ends_the_jsd_has_the_contract_of_a_kl(weight, mass):
    estimator = build("topk_divergence", k=2, divergence="jsd", mass=mass, teacher_weight=weight)
    verdict = verify(estimator, TabularPair.random(5, 2, seed=3))
    assert estimator.contract.at_equal == ("never" if mass == "truncate" else "sample")
    assert (verdict.norm_at_equal < 1e-14) == (mass != "truncate")


@fast
@given(st.lists(st.floats(-8, 8), min_size=6, max_size=6), st.lists(st.floats(-8, 8), min_size=6, max_size=6),
       st.floats(-8, 8))  # fmt: skip
def test_renormalised_it_is_blind_to_all_that_is_outside(student, teacher, shift):
    logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([teacher], dtype=torch.float64)
    estimator = build("teacher_topk", k=3)
    outside = torch.ones(6, dtype=torch.bool).index_fill(0, batch(estimator, logits, teacher).support_ids_BTK[0], False)
    shifted = (logits + shift * outside).detach().requires_grad_()
    loss, gradient, _ = evaluate(estimator, logits, teacher)
    shifted_loss, shifted_gradient, _ = evaluate(estimator, shifted, teacher)
    close(shifted_loss, loss)
    close(shifted_gradient, gradient)
    close(gradient[0, outside], torch.zeros(3))
    close(gradient.sum(), 0.0)


def mass_slope(name, logits, teacher, **keywords):
    """How fast a step against the gradient changes the student's mass on the support."""
    estimator = build(name, k=2, **keywords)
    tokens = batch(estimator, logits, teacher)
    mass = torch.where(tokens.support_mask_BTK, tokens.student_support_logps_BTK.exp(), 0.0).sum()
    (by_mass,) = torch.autograd.grad(mass, logits)
    return float(-(by_mass * evaluate(estimator, logits, teacher)[1]).sum())


@every_support
def test_at_equality_truncated_forms_move_the_mass_of_their_support(support):
    logits, _ = normal_logits(rows=1, vocabulary=7)
    assert mass_slope("topk_truncated_reverse_kl", logits, logits.detach(), support=support) < -1e-2
    assert mass_slope("topk_truncated_forward_kl", logits, logits.detach(), support=support) > 1e-2
    for name in ("topk_generalised_reverse_kl", "topk_tail_reverse_kl", "topk_tail_forward_kl"):
        assert abs(mass_slope(name, logits, logits.detach(), support=support)) < 1e-14


def test_the_clamp_silences_positions_with_more_student_than_teacher_mass():
    """Twice the same ranking: a student that is surer than the teacher, and one that is less sure."""
    logits = torch.tensor([[3.0, 2.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    plain, plain_gradient, _ = evaluate(build("topk_truncated_forward_kl", k=2), logits, teacher)
    clamped, gradient, _ = evaluate(build("topk_truncated_forward_kl", k=2, clamp=True), logits, teacher)
    assert plain[0] < 0 < plain[1]
    assert clamped[0] == 0
    assert (gradient[0] == 0).all()
    assert plain_gradient[0].abs().max() > 1e-2
    close(clamped[1], plain[1])
    close(gradient[1], plain_gradient[1])


FORMS = {
    "renormalised": ("topk_divergence", {"mass": "renormalise"}),
    "truncated": ("topk_truncated_reverse_kl", {}),
    "generalised": ("topk_generalised_reverse_kl", {}),
    "tail": ("topk_tail_reverse_kl", {}),
    "head and tail": ("head_and_tail", {}),
}


def early_in_training():
    """One position of twelve tokens; the teacher's top 4 hold most of its mass and little of the student's."""
    pair = TabularPair.random(12, 1, seed=19)
    student, teacher = pair.student_logits_CV[0].softmax(-1), pair.teacher_logits_CV[0].softmax(-1)
    masses = [
        float(p[q.topk(4).indices].sum()) for p, q in ((student, teacher), (teacher, teacher), (student, student))
    ]
    return pair, *masses


def cosines(pair, support):
    target = exact_gradient(pair, "reverse_kl")
    return {
        form: float(torch.cosine_similarity(expected_gradient(pair, build(name, k=4, support=support, **keywords)),
                                            target, dim=0))
        for form, (name, keywords) in FORMS.items()
    }  # fmt: skip


def test_with_little_student_mass_on_the_support_a_renormalised_gradient_points_the_wrong_way():
    pair, student_on_teachers, teacher_on_teachers, student_on_students = early_in_training()
    assert student_on_teachers < 0.2 < 0.7 < min(teacher_on_teachers, student_on_students)
    of_teacher, of_student = cosines(pair, "teacher"), cosines(pair, "student")
    assert of_teacher["renormalised"] < 0 < of_teacher["truncated"] < of_teacher["generalised"] < 1
    assert of_teacher["renormalised"] < of_teacher["tail"] < 1
    assert of_student["renormalised"] > of_teacher["renormalised"] + 0.5
    assert min(of_student["truncated"], of_student["generalised"], of_student["tail"]) > 0.9
    assert of_teacher["head and tail"] == pytest.approx(1, abs=1e-12)
    assert of_student["head and tail"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("name", "own"), [("student_topk", "student"), ("union_topk", "union")])
def test_a_name_with_its_own_support_takes_no_other(name, own):
    assert build(name).support == own
    with pytest.raises(UserError, match=f"support must be {own}, found 'teacher'; topk_divergence takes any"):
        build(name, support="teacher")


@pytest.mark.parametrize("name", [*NAMED, "topk_divergence"])
@pytest.mark.parametrize("k", [0, -1, 2.0, True, "4"])
def test_refuses_what_is_no_support_size(name, k):
    with pytest.raises(UserError, match=r"k must be a whole number of at least [12], found"):
        build(name, k=k)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"divergence": "tvd"}, "divergence must be one of reverse_kl, forward_kl, jsd, found 'tvd'"),
     ({"mass": "none"}, "mass must be one of truncate, renormalise, tail, generalised, found 'none'"),
     ({"teacher_weight": 1.5}, r"teacher_weight must lie in \[0, 1\], found 1.5"),
     ({"teacher_weight": float("nan")}, r"teacher_weight must lie in \[0, 1\], found nan"),
     ({"support": "both"}, "estimator.kwargs.support: expected one of teacher, student, union, intersection"),
     ({"clip": 1}, "estimator.kwargs.clip: expected a keyword of topk_divergence")],
)  # fmt: skip
def test_refuses_keywords_that_cannot_work(keywords, message):
    with pytest.raises(UserError, match=message):
        build("topk_divergence", **keywords)
