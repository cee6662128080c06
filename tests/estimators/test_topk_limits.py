"""Where a support ends: the whole vocabulary, one token, none; what the teacher cannot write; distant models; bf16."""

from itertools import product

import pytest
import torch
from references import close

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trace_variance
from lit_opd.functional import MASSES, SUPPORT_DIVERGENCES, SUPPORTS, choose_support
from lit_opd.types import TokenBatch

BY_NAME = ("topk_truncated_reverse_kl", "topk_generalised_reverse_kl", "topk_tail_reverse_kl",
           "topk_truncated_forward_kl", "topk_tail_forward_kl", "topk_soft_targets")  # fmt: skip
FROM_SAMPLES = ("head_and_tail", "head_and_tail_published", "resopd")
# None of these learns from the sampled token.
EXACT = [
    ("teacher_topk", {}), ("student_topk", {}), ("union_topk", {}),
    *((name, {"support": support}) for name, support in product(BY_NAME, SUPPORTS)),
    *(("topk_divergence", {"support": support, "divergence": divergence, "mass": mass})
      for support, divergence, mass in product(SUPPORTS, SUPPORT_DIVERGENCES, MASSES)),
    *(("topk_weighted_scores", {"support": support, "weights": weights})
      for support, weights in product(SUPPORTS, ("student", "teacher", "none"))),
]  # fmt: skip
EVERY = [*EXACT, ("entropy_aware", {}), *((name, {"support": s}) for name, s in product(FROM_SAMPLES, SUPPORTS))]
every_exact = pytest.mark.parametrize(("name", "keywords"), EXACT, ids=str)
every_form = pytest.mark.parametrize(("name", "keywords"), EVERY, ids=str)
every_support = pytest.mark.parametrize("support", SUPPORTS)


def normal_logits(rows=3, vocabulary=6):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def batch(estimator, student, teacher, ids_N=None):
    """What the estimator sees of positions with these log-probabilities; by default, token 0 was sampled."""
    ids_N = torch.zeros(len(student), dtype=torch.long) if ids_N is None else ids_N
    ids, mask = choose_support(student.detach(), teacher, estimator.support_size, estimator.support)
    student_N, teacher_N = (x.gather(-1, ids_N[:, None]).squeeze(-1) for x in (student, teacher))
    return TokenBatch(
        student_N, teacher_N, student_N.detach(), ids_N >= 0, completion_ids_BT=ids_N,
        support_ids_BTK=ids, support_mask_BTK=mask, student_support_logps_BTK=student.gather(-1, ids),
        teacher_support_logps_BTK=teacher.gather(-1, ids),
        teacher_entropy_BT=-(teacher.exp() * teacher.clamp(min=-1e9)).sum(-1),
    )  # fmt: skip


def evaluate(estimator, logits, teacher_logits, ids_N=None):
    """Loss, its gradient by the student's logits, and the KL estimate."""
    estimate = estimator(batch(estimator, logits.log_softmax(-1), teacher_logits.log_softmax(-1), ids_N))
    (gradient,) = torch.autograd.grad(estimate.loss_BT.sum(), logits)
    return estimate.loss_BT.detach(), gradient, estimate.kl_BT


@every_support
@pytest.mark.parametrize(
    ("name", "keywords"),
    [*(("topk_divergence", {"mass": mass}) for mass in MASSES), ("head_and_tail", {}), ("head_and_tail_published", {}),
     ("topk_weighted_scores", {}), ("resopd", {})],
    ids=str,
)  # fmt: skip
def test_over_the_whole_vocabulary_every_form_is_the_reverse_kl_without_noise(name, keywords, support):
    """I13."""
    pair = TabularPair.random(5, 2, seed=4)
    estimator = build(name, k=5, support=support, **keywords)
    close(expected_gradient(pair, estimator), exact_gradient(pair, "reverse_kl"))
    assert trace_variance(TabularPair.random(5, 1, seed=4), estimator) < 1e-28


@every_support
@pytest.mark.parametrize(
    ("name", "keywords"),
    [*(("topk_divergence", {"divergence": "forward_kl", "mass": mass}) for mass in MASSES), ("topk_soft_targets", {})],
    ids=str,
)
def test_over_the_whole_vocabulary_every_forward_form_is_the_forward_kl(name, keywords, support):
    pair = TabularPair.random(5, 2, seed=4)
    found = expected_gradient(pair, build(name, k=5, support=support, **keywords))
    close(found, exact_gradient(pair, "forward_kl"))


@every_form
def test_one_token_is_enough_unless_renormalised(name, keywords):
    estimator = build(name, k=2, **keywords)
    renormalised = estimator.keywords.get("mass") == "renormalise" or name == "teacher_topk"
    if renormalised and estimator.support != "union":
        with pytest.raises(UserError, match="at least 2, found 1; renormalised over one token"):
            build(name, k=1, **keywords)
        return
    _, gradient, _ = evaluate(build(name, k=1, **keywords), *normal_logits())
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-3 or estimator.support == "intersection"


@every_exact
def test_where_the_models_share_no_token_an_intersection_is_silent(name, keywords):
    logits = torch.tensor([[4.0, 3.0, 0.0, -1.0], [4.0, 0.0, 3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-1.0, 0.0, 3.0, 4.0], [4.0, 0.0, 1.0, -2.0]], dtype=torch.float64)
    loss, gradient, kl = evaluate(build(name, k=2, **keywords), logits, teacher)
    assert torch.isfinite(kl).all()
    assert gradient[1].abs().max() > 1e-4
    assert (loss[0] == 0 and (gradient[0] == 0).all()) == (keywords.get("support") == "intersection")


@pytest.mark.parametrize("name", FROM_SAMPLES)
def test_where_the_models_share_no_token_the_tail_is_all(name):
    logits = torch.tensor([[4.0, 3.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-1.0, 0.0, 3.0, 4.0]], dtype=torch.float64)
    _, gradient, kl = evaluate(build(name, k=2, support="intersection"), logits, teacher)
    p, d = logits.detach().softmax(-1), (logits.log_softmax(-1) - teacher.log_softmax(-1)).detach()[0, 0]
    close(gradient, d * (torch.tensor([[1.0, 0.0, 0.0, 0.0]]) - p))
    close(kl, d[None])


@every_exact
def test_what_the_teacher_cannot_write_outside_the_support_changes_nothing(name, keywords):
    """The sampled token is such a one: its log-ratio is infinite, and belongs into the log alone."""
    logits, teacher = normal_logits(rows=1)
    with torch.no_grad():
        logits[0, 4:] -= 9.0  # in nobody's top K
    teacher[0, 4:] = -torch.inf
    loss, gradient, kl = evaluate(build(name, k=3, **keywords), logits, teacher, torch.tensor([4]))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert (kl == torch.inf).all()


@every_support
@pytest.mark.parametrize("name", FROM_SAMPLES)
def test_nor_does_it_in_the_tail_unless_it_is_sampled(name, support):
    logits, teacher = (torch.tensor([[2.0, 1.0, 0.5, 0.0, -3.0, -3.0]]).double() * scale for scale in (1.0, 0.5))
    teacher[0, 4:] = -torch.inf
    estimator = build(name, k=3, support=support)
    logits.requires_grad_()
    for token in range(4):
        assert all(torch.isfinite(x).all() for x in evaluate(estimator, logits, teacher, torch.tensor([token])))
    assert evaluate(estimator, logits, teacher, torch.tensor([4]))[2] == torch.inf


@every_exact
def test_the_kl_is_never_nan_where_neither_model_can_write_the_token(name, keywords):
    logits, teacher = (torch.tensor([[1.0, 0.5, 0.0, -1.0, -torch.inf]]).double() * scale for scale in (1.0, 2.0))
    kl = evaluate(build(name, k=2, **keywords), logits.requires_grad_(), teacher, torch.tensor([4]))[2]
    assert torch.isfinite(kl).all()


@every_form
@pytest.mark.parametrize("sampled", [0, 3])
def test_log_ratios_of_sixty_stay_finite_in_fp32(name, keywords, sampled):
    logits = torch.tensor([[60.0, 0.0, 30.0, -60.0, 0.0]] * 2, requires_grad=True)
    teacher = torch.tensor([[-60.0, 0.0, 30.0, 60.0, 0.0], [60.0, 0.0, -30.0, -60.0, 0.0]])
    found = evaluate(build(name, k=3, **keywords), logits, teacher, torch.tensor([sampled, sampled]))
    assert all(torch.isfinite(x).all() for x in found)


@every_form
def test_bf16_log_probs_lose_nothing_but_their_own_rounding(name, keywords):
    estimator = build(name, k=3, **keywords)
    exact = vars(batch(estimator, *(x.detach().log_softmax(-1) for x in normal_logits())))
    low = {f: x.bfloat16() if torch.is_tensor(x) and x.dtype == torch.float64 else x for f, x in exact.items()}
    rounded = {f: x.double() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for f, x in low.items()}
    found, expected = estimator(TokenBatch(**low)), estimator(TokenBatch(**rounded))
    for low_BT, rounded_BT in ((found.loss_BT, expected.loss_BT), (found.kl_BT, expected.kl_BT)):
        assert low_BT.dtype == torch.float32
        close(low_BT, rounded_BT, atol=2e-5)
