"""Interpolated targets: closed form, ends, and what they do to the gradient of each direction."""

import pytest
import torch

from lit_opd.functional import forward_kl, interpolate_logps, reverse_kl

IMPOSSIBLE = -torch.inf


def logits_and_teacher():
    logits, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.requires_grad_(), teacher


def gradient(divergence, logits, target):
    return torch.autograd.grad(divergence(logits.log_softmax(-1), target).sum(), logits)[0]


def close(found, expected, atol=1e-13):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_it_is_the_softmax_of_interpolated_logits_and_the_normalised_geometric_mean(share):
    logits, teacher = logits_and_teacher()
    found = interpolate_logps(logits.log_softmax(-1), teacher.log_softmax(-1), share)
    close(found, ((1 - share) * logits + share * teacher).log_softmax(-1).detach())
    product = logits.softmax(-1) ** (1 - share) * teacher.softmax(-1) ** share
    close(found.exp(), (product / product.sum(-1, keepdim=True)).detach())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_it_carries_no_gradient(share):
    logits, teacher = logits_and_teacher()
    assert not interpolate_logps(logits.log_softmax(-1), teacher.requires_grad_().log_softmax(-1), share).requires_grad


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_with_the_reverse_kl_an_interpolated_target_only_rescales_the_gradient(share):
    logits, teacher = logits_and_teacher()
    target = interpolate_logps(logits.log_softmax(-1), teacher.log_softmax(-1), share)
    close(gradient(reverse_kl, logits, target), share * gradient(reverse_kl, logits, teacher.log_softmax(-1)))


def test_with_the_forward_kl_it_is_another_objective():
    logits, teacher = logits_and_teacher()
    target = interpolate_logps(logits.log_softmax(-1), teacher.log_softmax(-1), 0.2)
    found, plain = gradient(forward_kl, logits, target), gradient(forward_kl, logits, teacher.log_softmax(-1))
    assert torch.cosine_similarity(found.flatten(), plain.flatten(), dim=0) < 0.99
    # It is the difference of probabilities to the nearer target.
    close(found, logits.detach().softmax(-1) - target.exp())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_either_cannot_write_is_impossible_in_between_and_kept_at_the_ends(share):
    student = torch.tensor([0.5, IMPOSSIBLE, 1.0, IMPOSSIBLE]).log_softmax(-1)
    teacher = torch.tensor([IMPOSSIBLE, 0.5, 1.0, IMPOSSIBLE]).log_softmax(-1)
    expected = {0.0: student, 1.0: teacher, 0.3: torch.tensor([IMPOSSIBLE, IMPOSSIBLE, 0.0, IMPOSSIBLE])}
    assert torch.equal(interpolate_logps(student, teacher, share), expected[share])


def test_the_forward_kl_to_it_is_finite_where_the_teacher_cannot_write():
    logits = torch.tensor([0.5, 0.1, 1.0], requires_grad=True)
    target = interpolate_logps(logits.log_softmax(-1), torch.tensor([0.2, IMPOSSIBLE, 1.0]).log_softmax(-1), 0.5)
    assert torch.isfinite(gradient(forward_kl, logits, target)).all()


def test_bf16_is_raised():
    logits, teacher = (x.detach().bfloat16() for x in logits_and_teacher())
    assert {interpolate_logps(logits, teacher, share).dtype for share in (0.0, 0.5, 1.0)} == {torch.float32}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match="teacher_share"):
        interpolate_logps(*logits_and_teacher(), share)
