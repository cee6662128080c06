"""Divergences against SciPy and torch's own, in float64; direction, limits, impossible tokens, gradients."""

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.functional import (
    entropy,
    forward_kl,
    jsd,
    mixed_kl,
    renormalise,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from lit_opd.functional.divergences import expectation, log_difference

fast = settings(max_examples=50, deadline=None)
IMPOSSIBLE = -torch.inf


def lopsided_jsd(student, teacher):
    return jsd(student, teacher, 0.05)


def skewed_forward(student, teacher):
    return skew_forward_kl(student, teacher, 0.1)


def skewed_reverse(student, teacher):
    return skew_reverse_kl(student, teacher, 0.1)


def mixed(student, teacher):
    return mixed_kl(student, teacher, 0.3)


BOUNDED = [jsd, lopsided_jsd, skewed_forward, skewed_reverse, tvd]
ALL = [reverse_kl, forward_kl, mixed, *BOUNDED]


@st.composite
def pairs(draw):
    """Two [3, V] tables of log-probabilities, float64."""
    vocabulary = draw(st.integers(2, 9))
    numbers = st.lists(st.floats(-6, 6), min_size=6 * vocabulary, max_size=6 * vocabulary)
    return tuple(torch.tensor(draw(numbers), dtype=torch.float64).view(2, 3, vocabulary).log_softmax(-1))


def apart():
    """A student and a teacher that differ, so that a swapped direction shows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).log_softmax(-1)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=atol)


@fast
@given(pairs())
def test_kls_are_those_of_scipy_and_torch(pair):
    student, teacher = pair
    p, q = student.exp().numpy(), teacher.exp().numpy()
    close(reverse_kl(student, teacher), scipy.stats.entropy(p, q, axis=-1))
    close(forward_kl(student, teacher), scipy.stats.entropy(q, p, axis=-1))
    # torch's kl_div(input, target) is KL(target || input).
    torch_kl = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    close(reverse_kl(student, teacher), torch_kl)


@fast
@given(pairs())
def test_entropy_is_that_of_scipy(pair):
    close(entropy(pair[0]), scipy.stats.entropy(pair[0].exp().numpy(), axis=-1))


@fast
@given(pairs(), st.floats(0.01, 0.99))
def test_jsd_is_two_kls_to_the_mixture(pair, w):
    student, teacher = pair
    p, q = student.exp().numpy(), teacher.exp().numpy()
    m = w * q + (1 - w) * p
    expected = (w * scipy.stats.entropy(q, m, axis=-1) + (1 - w) * scipy.stats.entropy(p, m, axis=-1)) / (w * (1 - w))
    close(jsd(student, teacher, w), expected, atol=1e-10)


def test_jsd_at_one_half_is_four_times_the_jensen_shannon_divergence():
    student, teacher = apart()
    distance = [scipy.spatial.distance.jensenshannon(p, q) for p, q in zip(student.exp(), teacher.exp(), strict=True)]
    close(jsd(student, teacher), 4 * np.square(distance))


@pytest.mark.parametrize(("end", "limit"), [(0.0, forward_kl), (1.0, reverse_kl)])
def test_jsd_is_continuous_at_both_ends(end, limit):
    """Value and gradient (on logits) approach the KL in proportion to the distance from the end."""
    logits, teacher = apart()
    logits.requires_grad_()
    student = logits.log_softmax(-1)
    target = limit(student, teacher)
    (target_gradient,) = torch.autograd.grad(target.sum(), logits, retain_graph=True)
    for distance in (1e-3, 1e-4):
        value = jsd(student, teacher, abs(end - distance))
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        close(value, target, atol=20 * distance)
        close(gradient, target_gradient, atol=20 * distance)
    assert torch.equal(jsd(student, teacher, end), target)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_jsd_refuses_a_weight_that_is_no_share(weight):
    with pytest.raises(ValueError, match="teacher_weight"):
        jsd(*apart(), weight)


@fast
@given(pairs(), st.floats(0.01, 0.99))
def test_skewed_kls_are_kls_to_a_mixture(pair, skew):
    student, teacher = pair
    p, q = student.exp().numpy(), teacher.exp().numpy()
    close(skew_forward_kl(student, teacher, skew), scipy.stats.entropy(q, skew * q + (1 - skew) * p, axis=-1))
    close(skew_reverse_kl(student, teacher, skew), scipy.stats.entropy(p, skew * p + (1 - skew) * q, axis=-1))


@fast
@given(pairs(), st.floats(0.01, 0.99))
def test_the_jsd_is_made_of_the_two_skewed_kls(pair, w):
    parts = skew_reverse_kl(*pair, 1 - w) / w + skew_forward_kl(*pair, w) / (1 - w)
    close(jsd(*pair, w), parts, atol=1e-11)


@pytest.mark.parametrize(("skewed", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_without_skew_the_kls_are_plain_and_a_little_skew_changes_little(skewed, plain):
    student, teacher = apart()
    assert torch.equal(skewed(student, teacher, 0.0), plain(student, teacher))
    close(skewed(student, teacher, 1e-9), plain(student, teacher), atol=1e-6)
    assert ((skewed(student, teacher, 0.1) - plain(student, teacher)).abs() > 1e-3).all()


@pytest.mark.parametrize("skewed", [skew_forward_kl, skew_reverse_kl])
def test_skewed_kls_are_bounded_even_where_nothing_is_shared(skewed):
    student, teacher = torch.tensor([[0.0, IMPOSSIBLE], [IMPOSSIBLE, 0.0]], dtype=torch.float64)
    close(skewed(student, teacher, 0.1), -np.log(0.1))


@pytest.mark.parametrize("skew", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("skewed", [skew_forward_kl, skew_reverse_kl])
def test_skewed_kls_refuse_what_is_no_skew(skewed, skew):
    with pytest.raises(ValueError, match=r"skew must lie in \[0, 1\), found"):
        skewed(*apart(), skew)


@fast
@given(pairs(), st.floats(0, 1))
def test_mixed_kl_is_a_weighted_sum(pair, share):
    p, q = (x.exp().numpy() for x in pair)
    forward, reverse = scipy.stats.entropy(q, p, axis=-1), scipy.stats.entropy(p, q, axis=-1)
    close(mixed_kl(*pair, share), share * forward + (1 - share) * reverse)


def test_a_direction_of_weight_zero_may_be_infinite():
    student, teacher = logits_with([], [2])
    assert torch.isposinf(mixed_kl(student.log_softmax(-1), teacher, 0.5))
    value = mixed_kl(student.log_softmax(-1), teacher, 1.0)
    assert torch.isfinite(torch.stack([value, *torch.autograd.grad(value, student)[0]])).all()
    assert torch.isfinite(mixed_kl(teacher, student.log_softmax(-1), 0.0))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_mixed_kl_refuses_a_weight_that_is_no_share(share):
    with pytest.raises(ValueError, match="forward_weight"):
        mixed_kl(*apart(), share)


@fast
@given(pairs())
def test_tvd_is_half_the_distance_and_within_pinsker(pair):
    student, teacher = pair
    close(tvd(student, teacher), 0.5 * np.abs(student.exp().numpy() - teacher.exp().numpy()).sum(-1))
    assert (tvd(student, teacher) <= (reverse_kl(student, teacher) / 2).clamp(min=0).sqrt() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ALL, ids=lambda f: f.__name__)
def test_log_ratios_of_sixty_are_finite_in_value_and_gradient(divergence, dtype):
    logits = torch.tensor([0.0, 60.0, -60.0, 5.0, 1.0], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([60.0, 0.0, 0.0, -60.0, 1.0], dtype=dtype).log_softmax(-1)
    value = divergence(logits.log_softmax(-1), teacher)
    (gradient,) = torch.autograd.grad(value, logits)
    exact = logits.detach().double().requires_grad_()
    expected = divergence(exact.log_softmax(-1), teacher.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-5, atol=1e-5)


def test_directions_differ():
    student, teacher = apart()
    assert ((reverse_kl(student, teacher) - forward_kl(student, teacher)).abs() > 1e-3).all()
    close(reverse_kl(student, teacher), forward_kl(teacher, student), atol=0)
    close(jsd(student, teacher, 0.2), jsd(teacher, student, 0.8))
    assert ((jsd(student, teacher, 0.2) - jsd(student, teacher, 0.8)).abs() > 1e-3).all()


@pytest.mark.parametrize("divergence", ALL, ids=lambda f: f.__name__)
def test_no_gradient_at_equality(divergence):
    logits = apart()[0].clone().requires_grad_()
    value = divergence(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    close(torch.autograd.grad(value.sum(), logits)[0], torch.zeros(4, 6).double())


@fast
@given(pairs(), st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 0.99)))
def test_zero_at_equality_and_never_negative(pair, w):
    student, teacher = pair
    for divergence in (*ALL, lambda a, b: jsd(a, b, w)):
        assert (divergence(student, teacher) >= -1e-13).all()
        assert (divergence(student, student).abs() <= 1e-13).all()


def logits_with(student_impossible, teacher_impossible):
    student = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    teacher = torch.tensor([1.0, 0.2, -0.4, 0.1], dtype=torch.float64)
    student[list(student_impossible)], teacher[list(teacher_impossible)] = IMPOSSIBLE, IMPOSSIBLE
    return student.requires_grad_(), teacher.log_softmax(-1)


@pytest.mark.parametrize(
    ("divergence", "student_impossible", "teacher_impossible"),
    [
        (reverse_kl, [1, 2], [2]),
        (reverse_kl, [1, 2], []),
        (forward_kl, [2], [1, 2]),
        (forward_kl, [], [1, 2]),
        (jsd, [2], [2]),
        (jsd, [1, 2], [2, 3]),
        (lambda a, b: jsd(a, b, 0.1), [0, 1], [1, 2]),
        (lambda a, b: entropy(a), [1, 2], []),
        *[(divergence, *tokens) for divergence in BOUNDED for tokens in (([1, 2], [2, 3]), ([], [2]))],
        (mixed, [2], [2]),
    ],
    ids=lambda x: getattr(x, "__name__", None) or "".join(map(str, x)) or "none",
)
def test_impossible_tokens_count_zero_in_value_and_gradient(divergence, student_impossible, teacher_impossible):
    """As if the token was not in the vocabulary: the limit of a probability that goes to zero."""
    student, teacher = logits_with(student_impossible, teacher_impossible)
    value = divergence(student.log_softmax(-1), teacher)
    (gradient,) = torch.autograd.grad(value, student)
    nearly = torch.where(torch.isneginf(student), -60.0, student).detach().requires_grad_()
    nearly_teacher = torch.where(torch.isneginf(teacher), -60.0, teacher)
    expected = divergence(nearly.log_softmax(-1), nearly_teacher)
    close(value, expected)
    close(gradient, torch.autograd.grad(expected, nearly)[0])


def test_reverse_kl_is_infinite_where_the_student_writes_what_the_teacher_cannot():
    student, teacher = logits_with([], [2])
    assert torch.isposinf(reverse_kl(student.log_softmax(-1), teacher))
    assert torch.isposinf(forward_kl(teacher, student.log_softmax(-1)))


@pytest.mark.parametrize(
    "function",
    [
        *ALL,
        lambda a, b: entropy(a) + entropy(b),
        lambda a, b: reverse_kl(*(renormalise(x[..., :3]) for x in (a, b))),
    ],
    ids=lambda f: f.__name__,
)
def test_gradients_by_finite_differences(function):
    logits = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = (x.clone().requires_grad_() for x in logits)
    assert torch.autograd.gradcheck(lambda a, b: function(a.log_softmax(-1), b.log_softmax(-1)), (a, b))


def test_renormalise_sums_to_one_and_keeps_ratios():
    logps = apart()[0][:, :3]
    found = renormalise(logps)
    close(found.exp().sum(-1), torch.ones(4).double())
    close(found - found[:, :1], logps - logps[:, :1])


@pytest.mark.parametrize("function", [reverse_kl, forward_kl, jsd, mixed, skewed_forward, skewed_reverse, tvd])
def test_bf16_is_raised_before_the_maths(function):
    """At a KL of 1e-4 bf16 arithmetic would return noise of either sign."""
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    student = logits.bfloat16()
    teacher = (logits + 0.02 * torch.randn(200, 64, generator=torch.Generator().manual_seed(3))).bfloat16()
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    found = function(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, function(student.bfloat16().float(), teacher.bfloat16().float()))
    torch.testing.assert_close(function(student, teacher), function(student.double(), teacher.double()).float(),
                               rtol=1e-2, atol=1e-6)  # fmt: skip


def where_based(student_logps, teacher_logps):
    return expectation(student_logps.exp(), log_difference(student_logps, teacher_logps))


EITHER = pytest.mark.parametrize("function", [reverse_kl, where_based], ids=["fused", "where"])
SHAPES = pytest.mark.parametrize(("student_shape", "teacher_shape"),
                                 [((5,), (5,)), ((2, 3, 5), (2, 3, 5)), ((4, 5), (5,)), ((5,), (2, 5)),
                                  ((2, 1, 5), (3, 5))])  # fmt: skip


def tables(*shapes):
    """Finite numbers that need not be normalised: each is a variable of its own."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@EITHER
@SHAPES
def test_gradients_on_log_probabilities_themselves_by_finite_differences(function, student_shape, teacher_shape):
    student, teacher = tables(student_shape, teacher_shape)
    assert torch.autograd.gradcheck(function, (student, teacher))
    assert torch.autograd.gradcheck(lambda x: function(x, teacher.detach()), student)
    assert torch.autograd.gradcheck(lambda x: function(student.detach(), x), teacher)


@SHAPES
def test_the_fused_sum_is_the_one_by_where(student_shape, teacher_shape):
    leaves = tables(student_shape, teacher_shape)
    with torch.no_grad():  # the student cannot write two of them, the teacher one of these
        leaves[0][..., [1, 2]] = IMPOSSIBLE
        leaves[1][..., 2] = IMPOSSIBLE
    found, expected = reverse_kl(*leaves), where_based(*leaves)
    close(found, expected.detach())
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for one, two in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)), strict=True):
        close(one, two)


@EITHER
@pytest.mark.parametrize(("student_impossible", "teacher_impossible"), [([1], [1]), ([1, 2], [2]), ([0, 4], [])])
def test_what_the_student_cannot_write_has_no_gradient_and_the_rest_that_of_a_sum_without_it(
    function, student_impossible, teacher_impossible
):
    leaves = tables((3, 5), (3, 5))
    with torch.no_grad():
        leaves[0][:, student_impossible], leaves[1][:, teacher_impossible] = IMPOSSIBLE, IMPOSSIBLE
    value = function(*leaves)
    rest = [i for i in range(5) if i not in student_impossible]
    small = [x.detach()[:, rest].requires_grad_() for x in leaves]
    expected = (small[0].exp() * (small[0] - small[1])).sum(-1)
    close(value, expected)
    for whole, part in zip(*(torch.autograd.grad(v.sum(), x) for v, x in ((value, leaves), (expected, small))),
                           strict=True):  # fmt: skip
        close(whole[:, rest], part)
        assert not whole[:, student_impossible].any()


@EITHER
def test_the_sum_is_infinite_where_the_student_writes_what_the_teacher_cannot(function):
    student, teacher = tables((2, 5), (2, 5))
    with torch.no_grad():
        teacher[0, 3] = IMPOSSIBLE
    value = function(student, teacher)
    assert torch.isposinf(value[0])
    assert torch.isfinite(value[1])
    for gradient in torch.autograd.grad(value[1], (student, teacher)):
        assert torch.isfinite(gradient[1]).all()


def test_a_log_difference_is_zero_and_flat_where_both_are_impossible():
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True)
            for x in ([IMPOSSIBLE, IMPOSSIBLE, 0.5, 2.0], [IMPOSSIBLE, 1.0, IMPOSSIBLE, 0.5]))  # fmt: skip
    found = log_difference(a, b)
    assert found.tolist() == [0.0, IMPOSSIBLE, -IMPOSSIBLE, 1.5]
    to_a, to_b = torch.autograd.grad(found.sum(), (a, b))
    assert to_a.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert to_b.tolist() == [0.0, -1.0, -1.0, -1.0]


def test_a_weight_of_zero_counts_zero_whatever_the_value():
    weights = torch.tensor([0.0, 0.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([torch.inf, 5.0, -1.0, 4.0], dtype=torch.float64, requires_grad=True)
    found = expectation(weights, values)
    close(found, torch.tensor(7.7, dtype=torch.float64))
    to_weights, to_values = torch.autograd.grad(found, (weights, values))
    assert to_weights.tolist() == [0.0, 0.0, -1.0, 4.0]
    assert to_values.tolist() == [0.0, 0.0, 0.3, 2.0]
