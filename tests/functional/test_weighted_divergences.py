"""Adaptive weights against plain loops; what their gradients are in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import close

from lit_opd.functional import WEIGHTINGS, adaptive_kl, forward_kl, logit_matching, reverse_kl, todi

fast = settings(max_examples=50, deadline=None)
IMPOSSIBLE = -torch.inf
ALL = [adaptive_kl, todi, logit_matching]


def logits_and_teacher(seed=0, rows=4, vocabulary=6):
    logits, teacher = torch.randn(2, rows, vocabulary, generator=torch.Generator().manual_seed(seed)).double()
    return logits.requires_grad_(), teacher.log_softmax(-1)


def gradient(function, logits, teacher):
    return torch.autograd.grad(function(logits.log_softmax(-1), teacher).sum(), logits)[0]


def loop_share_of_head(p, q, head_mass):
    head, tail, mass = 0.0, 0.0, 0.0
    for v in sorted(range(len(q)), key=lambda v: -q[v]):
        gap = abs(p[v] - q[v])
        head, tail = (head + gap, tail) if mass < head_mass else (head, tail + gap)
        mass += q[v]
    return head / (head + tail) if head + tail else 0.5


@fast
@given(st.integers(2, 9).flatmap(lambda v: st.lists(st.floats(-6, 6), min_size=2 * v, max_size=2 * v)))
def test_adaptive_kl_is_a_loop_over_sorted_tokens(numbers):
    student, teacher = torch.tensor(numbers, dtype=torch.float64).view(2, -1).log_softmax(-1)
    p, q = student.exp().tolist(), teacher.exp().tolist()
    share = loop_share_of_head(p, q, 0.3711)
    forward = math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    reverse = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    close(adaptive_kl(student, teacher, 0.3711), share * forward + (1 - share) * reverse, atol=1e-9)


def test_the_head_ends_where_its_mass_is_reached():
    teacher = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    agrees_on_head = torch.tensor([0.4, 0.5, 0.1], dtype=torch.float64).log()
    close(adaptive_kl(agrees_on_head, teacher, 0.5), reverse_kl(agrees_on_head, teacher))
    assert adaptive_kl(agrees_on_head, teacher, 0.6) != reverse_kl(agrees_on_head, teacher)
    close(adaptive_kl(agrees_on_head, teacher, 1.0), forward_kl(agrees_on_head, teacher))


def test_adaptive_weights_carry_no_gradient():
    logits, teacher = logits_and_teacher()
    forward, reverse = gradient(forward_kl, logits, teacher), gradient(reverse_kl, logits, teacher)
    p, q = logits.detach().softmax(-1), teacher.exp()
    share = torch.tensor([loop_share_of_head(*row, 0.5) for row in zip(p.tolist(), q.tolist(), strict=True)])[:, None]
    close(gradient(adaptive_kl, logits, teacher), share * forward + (1 - share) * reverse, atol=1e-7)


def test_what_the_teacher_cannot_write_is_never_in_its_head():
    """Else the reverse KL, infinite there, could meet a weight of zero."""
    student = torch.tensor([0.1] * 10, dtype=torch.float32).log()
    teacher = torch.tensor([1 / 9] * 9 + [0.0], dtype=torch.float32).log()
    assert torch.isposinf(adaptive_kl(student, teacher, 1.0))


@pytest.mark.parametrize("head_mass", [0.0, 1.1, float("nan")])
def test_adaptive_kl_refuses_a_head_without_mass(head_mass):
    with pytest.raises(ValueError, match=r"head_mass must lie in \(0, 1\], found"):
        adaptive_kl(*logits_and_teacher(), head_mass)


@fast
@given(st.integers(2, 9).flatmap(lambda v: st.lists(st.floats(-6, 6), min_size=2 * v, max_size=2 * v)))
def test_the_value_of_todi_is_the_sum_of_both_kls(numbers):
    student, teacher = torch.tensor(numbers, dtype=torch.float64).view(2, -1).log_softmax(-1)
    close(todi(student, teacher), forward_kl(student, teacher) + reverse_kl(student, teacher), atol=1e-10)


def test_the_gradient_of_todi_is_that_of_fixed_weights():
    logits, teacher = logits_and_teacher()
    p, q = logits.detach().softmax(-1), teacher.exp()
    a = q / (p + q)
    on_logps = -a * q + (1 - a) * p * ((p / q).log() + 1)
    expected = on_logps - p * on_logps.sum(-1, keepdim=True)
    found = gradient(todi, logits, teacher)
    close(found, expected)
    both = gradient(lambda s, t: forward_kl(s, t) + reverse_kl(s, t), logits, teacher)
    assert (found - both).norm() > 0.1 * both.norm()


def test_logit_matching_by_the_student_has_exactly_the_gradient_of_the_reverse_kl():
    logits, teacher = logits_and_teacher()
    close(gradient(logit_matching, logits, teacher), gradient(reverse_kl, logits, teacher))
    by_teacher = gradient(lambda s, t: logit_matching(s, t, "teacher"), logits, teacher)
    assert (by_teacher - gradient(forward_kl, logits, teacher)).norm() > 0.1


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_logit_matching_is_a_sum_over_pairs_of_raw_logits(weighting):
    """Computed from logits that are shifted at random, not from log-probabilities."""
    logits, teacher = logits_and_teacher(rows=1)
    raw_student, raw_teacher = (logits + 3.7)[0].tolist(), (teacher - 1.3)[0].tolist()
    weights = {"student": logits.softmax(-1), "teacher": teacher.exp(), "uniform": torch.full((1, 6), 1 / 6)}
    w = weights[weighting][0].tolist()
    pairs = [
        w[i] * w[j] * ((raw_student[i] - raw_student[j]) - (raw_teacher[i] - raw_teacher[j])) ** 2 / 4
        for i in range(6)
        for j in range(6)
    ]
    close(logit_matching(logits.log_softmax(-1), teacher, weighting)[0], math.fsum(pairs), atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_gradient_of_logit_matching_is_linear_in_the_gap_of_logits(weighting):
    logits, teacher = logits_and_teacher()
    weights = {"student": logits.softmax(-1), "teacher": teacher.exp(), "uniform": torch.full((4, 6), 1 / 6).double()}
    w, gap = weights[weighting].detach(), logits.detach() - teacher
    expected = w * (gap - (w * gap).sum(-1, keepdim=True))
    close(gradient(lambda s, t: logit_matching(s, t, weighting), logits, teacher), expected, atol=1e-7)


def test_a_saturated_student_feels_the_uniform_weighting_and_no_kl():
    logits = torch.tensor([0.0, 60.0, 0.0], requires_grad=True)
    teacher = torch.tensor([0.0, 40.0, 0.0]).log_softmax(-1)
    assert gradient(lambda s, t: logit_matching(s, t, "uniform"), logits, teacher).abs().max() > 1
    for kl in (forward_kl, reverse_kl):
        assert gradient(kl, logits, teacher).abs().max() < 1e-10


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_logit_matching_leaves_out_what_either_cannot_write(weighting):
    logits, teacher = logits_and_teacher()
    kept = [0, 3, 5]
    expected = logit_matching(logits[:, kept].log_softmax(-1), teacher[:, kept].log_softmax(-1), weighting)
    student = logits.index_fill(-1, torch.tensor([1, 2]), IMPOSSIBLE)
    teacher = teacher.index_fill(-1, torch.tensor([2, 4]), IMPOSSIBLE).log_softmax(-1)
    found = logit_matching(student.log_softmax(-1), teacher, weighting)
    close(found, expected)
    assert torch.isfinite(torch.autograd.grad(found.sum(), logits)[0]).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_logit_matching_is_zero_where_no_token_is_shared(weighting):
    logits = torch.tensor([1.0, 2.0, IMPOSSIBLE, IMPOSSIBLE], requires_grad=True)
    found = logit_matching(logits.log_softmax(-1), logits.detach().flip(0).log_softmax(-1), weighting)
    assert found == 0
    assert torch.equal(torch.autograd.grad(found, logits)[0], torch.zeros(4))


def test_logit_matching_refuses_an_unknown_weighting():
    with pytest.raises(ValueError, match="weighting must be one of student, teacher, uniform, found 'nobody'"):
        logit_matching(*logits_and_teacher(), "nobody")


@pytest.mark.parametrize("function", ALL)
def test_value_and_gradient_are_zero_at_equality(function):
    logits, _ = logits_and_teacher()
    teacher = logits.detach().log_softmax(-1)
    close(function(logits.log_softmax(-1), teacher), torch.zeros(4))
    close(gradient(function, logits, teacher), torch.zeros(4, 6))


@pytest.mark.parametrize("function", ALL)
def test_tokens_that_neither_can_write_change_nothing(function):
    logits, teacher = logits_and_teacher()
    wider = torch.cat([logits, torch.full((4, 2), IMPOSSIBLE)], dim=-1)
    wide_teacher = torch.cat([teacher, torch.full((4, 2), IMPOSSIBLE)], dim=-1)
    found = function(wider.log_softmax(-1), wide_teacher)
    close(found, function(logits.log_softmax(-1), teacher))
    close(torch.autograd.grad(found.sum(), logits)[0], gradient(function, logits, teacher))


@pytest.mark.parametrize("function", ALL)
def test_log_ratios_of_sixty_in_bf16_are_finite_and_raised(function):
    logits = torch.tensor([0.0, 60.0, -60.0, 5.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor([60.0, 0.0, 0.0, -60.0, 1.0], dtype=torch.bfloat16).log_softmax(-1)
    value = function(logits.log_softmax(-1), teacher)
    assert value.dtype == torch.float32
    assert torch.isfinite(torch.autograd.grad(value, logits)[0]).all()
    exact = function(logits.detach().log_softmax(-1).double(), teacher.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
