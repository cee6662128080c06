"""Nearer and truncated targets: closed-form gradients, their schedule, and why the direction is the forward one."""

import math

import pytest
import torch
from references import close, kl, normal_logits, softmax

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, second_moment, verify
from lit_opd.functional import SUPPORTS, choose_support, forward_kl, interpolate_logps, reverse_kl
from lit_opd.types import TokenBatch

SHARES = [0.2, 0.5, 1.0]


def batch(estimator, student, teacher, progress=0.0, ids_N=None):
    """What the estimator sees of positions with these log-probabilities; by default, token 0 was sampled."""
    ids_N = torch.zeros(len(student), dtype=torch.long) if ids_N is None else ids_N
    student_N, teacher_N = (x.gather(-1, ids_N[:, None]).squeeze(-1) for x in (student, teacher))
    fields = {"student_full_logps_BTV": student, "teacher_full_logps_BTV": teacher}
    if estimator.support_size:
        ids, mask = choose_support(student.detach(), teacher, estimator.support_size, estimator.support)
        fields = {"support_mask_BTK": mask, "student_support_logps_BTK": student.gather(-1, ids),
                  "teacher_support_logps_BTK": teacher.gather(-1, ids)}  # fmt: skip
    return TokenBatch(student_N, teacher_N, student_N.detach(), ids_N >= 0, progress=progress, **fields)


def evaluate(estimator, logits, teacher_logits, progress=0.0, ids_N=None):
    tokens = batch(estimator, logits.log_softmax(-1), teacher_logits.log_softmax(-1), progress, ids_N)
    estimate = estimator(tokens)
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), logits)
    return estimate.loss_BT.detach(), gradient, estimate.kl_BT


def between(p, q, share):
    """The normalised geometric mean, by its definition."""
    product = [x ** (1 - share) * y**share for x, y in zip(p, q, strict=True)]
    return [x / math.fsum(product) for x in product]


@pytest.mark.parametrize("share", SHARES)
def test_veto_is_the_forward_kl_to_the_geometric_mean(share):
    logits, teacher = normal_logits()
    loss, gradient, logged = evaluate(build("veto", teacher_share=share), logits, teacher)
    for row in range(len(logits)):
        p, q = softmax(logits[row].tolist()), softmax(teacher[row].tolist())
        m = between(p, q, share)
        close(loss[row], kl(m, p))
        close(gradient[row], [x - y for x, y in zip(p, m, strict=True)])
        close(logged[row], kl(p, q))


@pytest.mark.parametrize(
    ("start", "progress"), [(0.4, 0.0), (0.4, 0.5), (0.4, 1.0), (0.0, 0.0), (0.0, 0.3), (1.0, 0.0)]
)
def test_taid_wanders_from_its_start_to_the_teacher(start, progress):
    logits, teacher = normal_logits()
    loss, gradient, logged = evaluate(build("taid", start=start), logits, teacher, progress)
    share = start + (1 - start) * progress
    for row in range(len(logits)):
        p, q = softmax(logits[row].tolist()), softmax(teacher[row].tolist())
        m = between(p, q, share)
        close(loss[row], kl(m, p))
        close(gradient[row], [x - y for x, y in zip(p, m, strict=True)])
        close(logged[row], kl(p, q))


def test_at_the_end_of_training_taid_is_the_forward_kl():
    logits, teacher = normal_logits()
    _, gradient, _ = evaluate(build("taid", start=0.1), logits, teacher, progress=1.0)
    close(gradient, evaluate(build("full_vocab", divergence="forward_kl"), logits, teacher)[1])


@pytest.mark.parametrize("name", ["taid", "veto"])
def test_a_nearer_target_pulls_less_and_not_just_less(name):
    """Shorter than the forward KL's gradient, and in another direction."""
    pair = TabularPair.random(6, 1, seed=1, scale=2.0)
    found, target = expected_gradient(pair, build(name)), exact_gradient(pair, "forward_kl")
    assert found.norm() < target.norm()
    assert torch.cosine_similarity(found, target, dim=0) < 0.999
    assert build(name).contract.target is None


@pytest.mark.parametrize("share", SHARES)
def test_in_the_reverse_direction_the_same_target_is_only_a_smaller_step(share):
    logits, teacher = normal_logits()
    student = logits.log_softmax(-1)
    target = interpolate_logps(student, teacher.log_softmax(-1), share)
    (found,) = torch.autograd.grad(reverse_kl(student, target).sum(), logits)
    close(found, share * evaluate(build("full_vocab"), logits, teacher)[1])


@pytest.mark.parametrize("support", SUPPORTS)
def test_soft_targets_are_the_forward_kl_to_the_truncated_teacher(support):
    """By a logit p - q', where q' is zero outside the support; nothing where there is no support."""
    logits, teacher = normal_logits()
    loss, gradient, logged = evaluate(build("topk_soft_targets", k=3, support=support), logits, teacher)
    ids, mask = choose_support(logits.detach(), teacher, 3, support)
    for row in range(len(logits)):
        p, q = softmax(logits[row].tolist()), softmax(teacher[row].tolist())
        tokens = ids[row][mask[row]].tolist()
        cut = [x / math.fsum(q[i] for i in tokens) if i in tokens else 0.0 for i, x in enumerate(q)]
        close(loss[row], kl(cut, p))
        close(gradient[row], [x - y if tokens else 0.0 for x, y in zip(p, cut, strict=True)])
        close(logged[row], math.log(p[0] / q[0]))


def test_soft_targets_differ_from_the_cross_entropy_by_a_constant():
    logits, teacher = normal_logits()
    student = logits.log_softmax(-1)
    values, ids = teacher.log_softmax(-1).topk(3)
    cross_entropy = -(values.softmax(-1) * student.gather(-1, ids)).sum(-1)
    loss, gradient, _ = evaluate(build("topk_soft_targets", k=3), logits, teacher)
    close(gradient, torch.autograd.grad(cross_entropy.sum(), logits)[0])
    close(cross_entropy.detach() - loss, -(values.softmax(-1) * values.log_softmax(-1)).sum(-1))


def test_at_equality_soft_targets_pull_the_mass_into_the_support():
    """I12: the gradient is minus that of log P, and the student stands still only once P is one."""
    logits, _ = normal_logits()
    _, gradient, _ = evaluate(build("topk_soft_targets", k=3), logits, logits.detach())
    log_mass = logits.log_softmax(-1).topk(3).values.logsumexp(-1)
    close(gradient, -torch.autograd.grad(log_mass.sum(), logits)[0])
    assert gradient.abs().max() > 1e-2
    cut = logits.detach().clone()
    cut.scatter_(-1, logits.detach().topk(3, largest=False).indices, -40.0)
    _, gradient, _ = evaluate(build("topk_soft_targets", k=3), cut.requires_grad_(), logits.detach())
    assert gradient.abs().max() < 1e-15


RENORMALISED = ("topk_divergence", {"divergence": "forward_kl", "mass": "renormalise"})


def test_of_the_forward_kls_on_a_support_only_the_residual_symbol_rests_at_the_teacher_and_nowhere_else():
    """What the residual symbol mends of arXiv:2609.39275: either the student leaves the teacher, or never comes."""
    _, teacher = normal_logits()
    in_support = torch.zeros_like(teacher).scatter_(-1, teacher.topk(3).indices, 1.0)
    norms = {
        name: [float(evaluate(build(name, k=3, **keywords), logits.clone().requires_grad_(), teacher)[1].norm())
               for logits in (teacher, teacher + in_support)]
        for name, keywords in (("topk_soft_targets", {}), RENORMALISED, ("topk_tail_forward_kl", {}))
    }  # fmt: skip
    at_teacher, with_more_mass = zip(*norms.values(), strict=True)
    assert at_teacher[0] > 0.1  # it leaves
    assert max(at_teacher[1:]) < 1e-14
    assert with_more_mass[1] < 1e-14  # it never comes
    assert with_more_mass[2] > 0.1


@pytest.mark.parametrize("support", SUPPORTS)
def test_over_the_whole_vocabulary_soft_targets_are_the_forward_kl(support):
    pair = TabularPair.random(5, 2, seed=3)
    estimator = build("topk_soft_targets", k=5, support=support)
    assert verify(estimator, pair, "forward_kl").is_unbiased
    assert second_moment(pair.with_equal_models(), estimator) < 1e-28


def test_one_soft_target_is_the_teachers_favourite():
    logits, teacher = normal_logits()
    loss, _, _ = evaluate(build("topk_soft_targets", k=1), logits, teacher)
    best = teacher.argmax(-1, keepdim=True)
    close(loss, -logits.detach().log_softmax(-1).gather(-1, best).squeeze(-1))


every_name = pytest.mark.parametrize(
    ("name", "keywords"), [("veto", {}), ("taid", {}), ("topk_soft_targets", {"k": 3})], ids=str
)


@every_name
def test_what_the_teacher_cannot_write_is_no_obstacle(name, keywords):
    """The sampled token is such a one; the student could write it."""
    logits, teacher = normal_logits()
    teacher[:, 2] = -torch.inf
    sampled = torch.full((3,), 2)
    loss, gradient, logged = evaluate(build(name, **keywords), logits, teacher, 0.5, sampled)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert (logged == torch.inf).all()


@every_name
def test_log_ratios_of_sixty_stay_finite_in_fp32(name, keywords):
    logits = torch.tensor([[60.0, 0.0, -60.0, 1.0], [0.0, 0.0, 60.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-60.0, 0.0, 60.0, 1.0]] * 2)
    loss, gradient, logged = evaluate(build(name, **keywords), logits, teacher, 0.5)
    assert all(torch.isfinite(x).all() for x in (loss, gradient, logged))


@every_name
def test_bf16_log_probs_lose_nothing_but_their_own_rounding(name, keywords):
    student, teacher = (x.detach().log_softmax(-1).bfloat16() for x in normal_logits())
    estimator = build(name, **keywords)
    # bf16 knows ties; the support is chosen once.
    tokens = batch(estimator, student, teacher, 0.5)
    raised = {f: x.double() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for f, x in vars(tokens).items()}
    found = estimator(tokens).loss_BT
    assert found.dtype == torch.float32
    close(found, estimator(TokenBatch(**raised)).loss_BT, atol=1e-5)


def test_the_forward_kl_to_a_target_without_grad_is_what_autograd_sees():
    """Were the target not held fixed, the gradient of veto would not be p - m."""
    logits, teacher = normal_logits()
    student = logits.log_softmax(-1)
    moving = torch.log_softmax(0.5 * student + 0.5 * teacher.log_softmax(-1), -1)
    (through_both,) = torch.autograd.grad(forward_kl(student, moving).sum(), logits)
    assert (through_both - evaluate(build("veto"), logits, teacher)[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("veto", {"teacher_share": 0.0}, r"teacher_share must lie in \(0, 1\], found 0.0; without the teacher"),
     ("veto", {"teacher_share": 1.5}, r"teacher_share must lie in \(0, 1\], found 1.5"),
     ("taid", {"start": -0.1}, r"start must lie in \[0, 1\], found -0.1"),
     ("taid", {"start": float("nan")}, r"start must lie in \[0, 1\], found nan"),
     ("topk_soft_targets", {"k": 0}, "k must be a whole number of at least 1, found 0")],
)  # fmt: skip
def test_refuses_keywords_that_cannot_work(name, keywords, message):
    with pytest.raises(UserError, match=message):
        build(name, **keywords)
