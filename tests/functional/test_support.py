"""Divergences on a support against plain loops; what each treatment of the mass outside does and does not see."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import close

from lit_opd.functional import (
    MASSES,
    SUPPORT_DIVERGENCES,
    forward_kl,
    jsd,
    reverse_kl,
    support_divergence,
    support_mass,
)

fast = settings(max_examples=60, deadline=None)
FULL = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd}
every_divergence = pytest.mark.parametrize("divergence", SUPPORT_DIVERGENCES)
every_mass = pytest.mark.parametrize("mass", MASSES)


def logits_and_teacher(rows=4, vocabulary=8, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = scale * torch.randn(2, rows, vocabulary, generator=generator).to(dtype)
    return logits.requires_grad_(), teacher.log_softmax(-1)


def gradient(value, logits):
    return torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]


def on_first(logits, teacher, k, divergence, mass, **kwargs):
    student = logits.log_softmax(-1)[..., :k]
    return support_divergence(student, teacher[..., :k], divergence=divergence, mass=mass, **kwargs)


def by_loop(p, q, divergence, mass, w):
    """From lists of probabilities on the support, by the definitions."""
    if mass == "renormalise":
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    if mass == "tail":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]

    def kl(a, b):
        return math.fsum(
            x * math.log(x / y) + (y - x if mass == "generalised" else 0.0) for x, y in zip(a, b, strict=True)
        )

    if divergence != "jsd":
        return kl(p, q) if divergence == "reverse_kl" else kl(q, p)
    m = [w * y + (1 - w) * x for x, y in zip(p, q, strict=True)]
    return kl(p, m) / w + kl(q, m) / (1 - w)


@st.composite
def masked_supports(draw):
    vocabulary = draw(st.integers(3, 8))
    numbers = draw(st.lists(st.floats(-4, 4), min_size=2 * vocabulary, max_size=2 * vocabulary))
    student, teacher = torch.tensor(numbers, dtype=torch.float64).view(2, -1).log_softmax(-1)
    k = draw(st.integers(1, vocabulary - 1))
    mask = draw(st.lists(st.booleans(), min_size=k, max_size=k).filter(any))
    return student[:k], teacher[:k], torch.tensor(mask)


@fast
@given(masked_supports(), st.sampled_from(SUPPORT_DIVERGENCES), st.sampled_from(MASSES), st.floats(0.05, 0.95))
def test_equals_a_loop_over_the_slots_that_count(support, divergence, mass, w):
    student, teacher, mask = support
    expected = by_loop(student[mask].exp().tolist(), teacher[mask].exp().tolist(), divergence, mass, w)
    found = support_divergence(student, teacher, mask, divergence=divergence, mass=mass, teacher_weight=w)
    close(found, expected, atol=1e-10)


@every_mass
@every_divergence
def test_on_the_whole_vocabulary_it_is_the_full_divergence(divergence, mass):
    logits, teacher = logits_and_teacher()
    found, full = on_first(logits, teacher, 8, divergence, mass), FULL[divergence](logits.log_softmax(-1), teacher)
    close(found, full, atol=1e-13)
    close(gradient(found, logits), gradient(full, logits), atol=1e-13)


@every_mass
@every_divergence
def test_on_the_whole_of_a_large_vocabulary_fp32_is_exact_to_rounding(divergence, mass):
    """Here 1 - (sum of 8000 probabilities) is noise of either sign."""
    logits, teacher = logits_and_teacher(rows=4, vocabulary=8000, dtype=torch.float32, scale=2.0)
    found, full = on_first(logits, teacher, 8000, divergence, mass), FULL[divergence](logits.log_softmax(-1), teacher)
    close(found, full, atol=2e-5)
    close(gradient(found, logits), gradient(full, logits), atol=1e-6)


@every_divergence
def test_renormalised_over_one_token_it_is_identically_zero(divergence):
    logits, teacher = logits_and_teacher()
    alone = torch.tensor([False, True, False])
    for k, mask in ((1, None), (3, alone)):
        student = logits.log_softmax(-1)[:, :k]
        found = support_divergence(student, teacher[:, :k], mask, divergence=divergence, mass="renormalise")
        assert torch.equal(found, torch.zeros(4).double())
        assert torch.equal(gradient(found, logits), torch.zeros(4, 8).double())
        for mass in ("tail", "generalised"):
            assert (support_divergence(student, teacher[:, :k], mask, divergence=divergence, mass=mass) > 1e-6).all()


@every_mass
@every_divergence
def test_the_gradient_at_equality_is_zero_unless_a_kl_is_truncated(divergence, mass):
    logits, _ = logits_and_teacher()
    value = on_first(logits, logits.detach().log_softmax(-1), 3, divergence, mass)
    of_mass = gradient(support_mass(logits.log_softmax(-1)[:, :3]), logits)
    sign = {"reverse_kl": 1, "forward_kl": -1, "jsd": 0}[divergence] if mass == "truncate" else 0
    close(value, torch.zeros(4))
    close(gradient(value, logits), sign * of_mass)
    assert of_mass.abs().max() > 0.01


@fast
@given(masked_supports(), st.sampled_from(SUPPORT_DIVERGENCES))
def test_the_generalised_form_is_never_negative_and_a_truncated_kl_may_be(support, divergence):
    student, teacher, mask = support
    assert support_divergence(student, teacher, mask, divergence=divergence, mass="generalised") >= -1e-12


def test_a_truncated_kl_may_be_negative_and_pays_for_leaving_the_support():
    student, teacher = torch.tensor([[0.1], [0.5]]).log()
    assert support_divergence(student, teacher, divergence="reverse_kl", mass="truncate") < 0
    assert support_divergence(student, teacher, divergence="reverse_kl", mass="generalised") > 0


@every_divergence
def test_the_tail_is_never_above_the_full_divergence_and_grows_with_the_support(divergence):
    logits, teacher = logits_and_teacher(rows=50)
    values = torch.stack([on_first(logits, teacher, k, divergence, "tail") for k in range(9)])
    assert (values.diff(dim=0) >= -1e-12).all()
    close(values[-1], FULL[divergence](logits.log_softmax(-1), teacher))


def test_renormalising_is_blind_to_the_mass_and_the_others_are_not():
    """The student moves mass out of the support without changing the ratios on it."""
    _, teacher = logits_and_teacher()
    inside = teacher[:, :3]
    for mass in MASSES:
        found = support_divergence(inside - 1.0, inside, divergence="reverse_kl", mass=mass)
        assert (found.abs() > 1e-3).all() == (mass != "renormalise")


def test_the_generalised_jsd_is_truncated_inside_and_tends_to_the_generalised_kls():
    logits, teacher = logits_and_teacher()
    for w in (0.1, 0.5):
        parts = [on_first(logits, teacher, 3, "jsd", mass, teacher_weight=w) for mass in ("generalised", "truncate")]
        close(*parts)
    for end, kl in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        near = on_first(logits, teacher, 3, "jsd", "generalised", teacher_weight=abs(end - 1e-7))
        at_end = on_first(logits, teacher, 3, "jsd", "generalised", teacher_weight=end)
        assert torch.equal(at_end, on_first(logits, teacher, 3, kl, "generalised"))
        close(near, at_end, atol=1e-5)
        assert (near - on_first(logits, teacher, 3, kl, "truncate")).abs().max() > 0.01


@every_mass
@every_divergence
def test_masked_slots_may_hold_anything(divergence, mass):
    logits, teacher = logits_and_teacher()
    kept = support_divergence(logits.log_softmax(-1)[:, :2], teacher[:, :2], divergence=divergence, mass=mass)
    junk = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]] * 4).double().requires_grad_()
    student, mask = torch.cat([junk, logits.log_softmax(-1)[:, :2]], -1), torch.tensor([False] * 4 + [True] * 2)
    found = support_divergence(
        student, torch.cat([junk.detach(), teacher[:, :2]], -1), mask, divergence=divergence, mass=mass
    )
    close(found, kept)
    close(gradient(found, logits), gradient(kept, logits))
    assert torch.equal(gradient(found, junk), torch.zeros(4, 4).double())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_mass
@every_divergence
def test_a_support_without_any_slot_counts_zero_and_no_nan_is_made_on_the_way(divergence, mass):
    logits, teacher = logits_and_teacher()
    mask = torch.tensor([[False, False], [True, False], [False, False], [True, True]])
    student = logits.log_softmax(-1)[:, :2]
    found = support_divergence(student, teacher[:, :2], mask, divergence=divergence, mass=mass)
    assert found[[0, 2]].tolist() == [0.0, 0.0]
    with torch.autograd.detect_anomaly():
        assert torch.equal(gradient(found, logits)[[0, 2]], torch.zeros(2, 8).double())
        assert torch.isfinite(gradient(found, logits)).all()
    none = support_divergence(student[:, :0], teacher[:, :0], divergence=divergence, mass=mass)
    assert none.tolist() == [0.0] * 4


@pytest.mark.parametrize(("dtype", "outside"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_small_mass_outside_is_resolved(dtype, outside):
    p, q = [0.6, 0.3, 0.1], [0.5, 0.5 - outside, outside]
    student, teacher = (torch.tensor(x[:2], dtype=torch.float64).log().to(dtype) for x in (p, q))
    for divergence in SUPPORT_DIVERGENCES:
        found = support_divergence(student, teacher, divergence=divergence, mass="tail")
        close(found, by_loop(p, q, divergence, "full", 0.5), atol=1e-5)


CONFIDENT = [90.0, 0.0, 0.0, 0.0, 0.0]  # nothing outside the first three tokens, in fp32 and in float64
NEARLY = [16.0, 0.0, 0.0, 0.0, 0.0]  # 1e-7 outside each token but the first
OPEN = [0.0, 1.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [CONFIDENT, NEARLY, OPEN], ids=["confident", "nearly", "open"])
@pytest.mark.parametrize("student", [CONFIDENT, NEARLY, OPEN], ids=["confident", "nearly", "open"])
@every_divergence
def test_the_tail_is_finite_where_nothing_is_outside_on_either_side(divergence, student, teacher, dtype):
    logits = torch.tensor(student, dtype=dtype, requires_grad=True)
    teacher_logps = torch.tensor(teacher, dtype=dtype).log_softmax(-1)
    found = on_first(logits, teacher_logps, 3, divergence, "tail")
    assert torch.isfinite(found)
    assert torch.isfinite(gradient(found, logits)).all()
    assert found <= FULL[divergence](logits.log_softmax(-1), teacher_logps) + 1e-6
    if student == teacher:
        close(found, 0.0, atol=1e-6)
        close(gradient(found, logits), torch.zeros(5), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_mass
@every_divergence
def test_log_ratios_of_sixty_are_finite_in_value_and_gradient(divergence, mass, dtype):
    logits = torch.tensor([0.0, 60.0, -60.0, 5.0, 1.0], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([60.0, 0.0, 0.0, -60.0, 1.0], dtype=dtype).log_softmax(-1)
    for k in (1, 3, 4):
        found = on_first(logits, teacher, k, divergence, mass)
        assert torch.isfinite(found)
        assert torch.isfinite(gradient(found, logits)).all()


@every_mass
def test_the_forward_kl_is_finite_where_the_teacher_cannot_write(mass):
    logits = torch.tensor([0.3, 1.0, -0.5, 0.2], requires_grad=True)
    teacher = torch.tensor([0.3, -math.inf, 0.5, 0.2]).log_softmax(-1)
    found = on_first(logits, teacher, 3, "forward_kl", mass)
    assert torch.isfinite(found)
    assert torch.isfinite(gradient(found, logits)).all()
    assert torch.isposinf(on_first(logits, teacher, 3, "reverse_kl", mass))


@every_mass
@every_divergence
def test_gradients_by_finite_differences(divergence, mass):
    logits, teacher = logits_and_teacher(rows=2, vocabulary=5)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def value(student, teacher):
        student, teacher = student.log_softmax(-1)[:, :3], teacher.log_softmax(-1)[:, :3]
        return support_divergence(student, teacher, mask, divergence=divergence, mass=mass, teacher_weight=0.3)

    assert torch.autograd.gradcheck(value, (logits, teacher.clone().requires_grad_()))


@every_mass
@every_divergence
def test_bf16_is_raised(divergence, mass):
    student, teacher = (x.detach().log_softmax(-1)[:, :3].bfloat16() for x in logits_and_teacher())
    found = support_divergence(student, teacher, divergence=divergence, mass=mass)
    assert found.dtype == support_mass(student).dtype == torch.float32
    assert torch.equal(found, support_divergence(student.float(), teacher.float(), divergence=divergence, mass=mass))


def test_the_mass_is_that_of_the_slots_that_count():
    logps = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]]).log()
    close(support_mass(logps), [0.875, 0.875], atol=1e-6)
    close(support_mass(logps, torch.tensor([[True, False, True], [False] * 3])), [0.625, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"divergence": "kl", "mass": "tail"}, "divergence must be one of reverse_kl, forward_kl, jsd, found 'kl'"),
        (
            {"divergence": "jsd", "mass": "ghost"},
            "mass must be one of truncate, renormalise, tail, generalised, found 'ghost'",
        ),
        ({"divergence": "jsd", "mass": "tail", "teacher_weight": 1.2}, r"teacher_weight must lie in \[0, 1\], found"),
    ],
    ids=["divergence", "mass", "weight"],
)
def test_unknown_choices_are_refused(kwargs, message):
    logits, teacher = logits_and_teacher()
    with pytest.raises(ValueError, match=message):
        support_divergence(logits, teacher, **kwargs)
