"""Estimators on a support made of score functions: weights x log p, of its tokens or of the sampled one outside it.

>>> p, q = torch.tensor([[0.4, 0.4]]).log(), torch.tensor([[0.6, 0.2]]).log()  # K = 2 of a larger vocabulary
>>> tokens = TokenBatch(
...     p[:, 0], q[:, 0], p[:, 0], torch.tensor([True]), completion_ids_BT=torch.tensor([7]),
...     support_ids_BTK=torch.tensor([[3, 5]]), support_mask_BTK=torch.ones(1, 2).bool(),
...     student_support_logps_BTK=p, teacher_support_logps_BTK=q,
... )
>>> estimate = head_and_tail(tokens, k=2)  # token 7 was sampled, outside the support
>>> estimate.loss_BT, estimate.kl_BT
(tensor([0.4866]), tensor([-0.2904]))
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import sampled_reverse_kl
from lit_opd.estimators.topk import OTHER_SUPPORTS, check_k, sampled_log_ratio, support_logps
from lit_opd.functional.divergences import expectation, log_difference, renormalise, reverse_kl
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import allow, at_least, one_of, whole
from lit_opd.functional.support import MASSES, outside_logp, support_divergence
from lit_opd.types import Estimate, TokenBatch

WEIGHTS = ("student", "teacher", "none")


@register_estimator(
    "topk_weighted_scores",
    target="reverse_kl",
    needs="support",
    source="arXiv:2604.13016 (K-wise policy gradient)",
    check=allow(k=whole(), weights=one_of(WEIGHTS)),
    variants=(
        Variant({"weights": "teacher"}, "other weights"),
        Variant({"weights": "none"}, "other weights"),
        *OTHER_SUPPORTS,
    ),
)
def topk_weighted_scores(
    tokens: TokenBatch, *, k: int = 16, support: str = "teacher", weights: str = "student"
) -> Estimate:
    """Score K tokens a position instead of the sampled one, which moves the support's mass by the level of its KL.

    Formula, with d = log p - log q and w detached: loss_t = sum over S of w d log p. With the student's probabilities
    renormalised over S as weights, the gradient is that of `teacher_topk` plus (sum of w d) times that of the log of
    the student's mass on S: where the student is more probable on S than the teacher on average, S loses mass.

    Args:
        tokens: support log-probabilities under the full softmax, [..., K], nats.
        k: size of the support.
        support: whose most probable tokens.
        weights: whose probabilities, renormalised over S, are the weights: `student`, `teacher`, or `none` for one.
    """
    student_logps, teacher_logps = support_logps(tokens)
    assert tokens.support_mask_BTK is not None
    if weights == "none":
        weight = tokens.support_mask_BTK.to(student_logps.dtype)
    else:
        weight = renormalise({"student": student_logps, "teacher": teacher_logps}[weights]).exp()
    # Not above zero: an empty slot, a token the weigher cannot write, or NaN, the weights of an empty support.
    cost = torch.where(weight > 0, weight * log_difference(student_logps, teacher_logps), 0.0).detach()
    loss = (cost * student_logps.masked_fill(cost == 0, 0.0)).sum(-1)
    return Estimate(loss_BT=loss, kl_BT=sampled_log_ratio(tokens))


def _tail_log_ratio(tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Find where the sampled token is outside the support, and its detached log-ratio there, zero elsewhere."""
    assert tokens.completion_ids_BT is not None
    assert tokens.support_ids_BTK is not None
    assert tokens.support_mask_BTK is not None
    inside = (tokens.support_ids_BTK == tokens.completion_ids_BT[..., None]) & tokens.support_mask_BTK
    outside = ~inside.any(-1)
    return outside, torch.where(outside, sampled_log_ratio(tokens), 0.0)


@register_estimator(
    "head_and_tail",
    target="reverse_kl",
    unbiased=True,
    needs="support",
    source="arXiv:2602.04417 with the log-ratio of its head detached",
    check=allow(k=whole()),
    on_policy=True,
    variants=OTHER_SUPPORTS,
)
def head_and_tail(tokens: TokenBatch, *, k: int = 16, support: str = "teacher") -> Estimate:
    """Sum the reverse KL over K tokens and sample it outside them, without bias and with the tail's noise alone.

    Formula, with d = log p - log q detached and y the sampled token: loss_t = sum over S of p d, plus d_y log p(y) if
    y is outside S. Over y ~ p the expected gradient is that of KL(student || teacher) at the position, whatever S is;
    only the tail is noise, so that the variance falls as the student's mass on S grows.

    Args:
        tokens: support and sampled log-probabilities under the full softmax, [..., K] and [...], nats, and the ids.
        k: size of the support.
        support: whose most probable tokens.

    Returns:
        Surrogate loss, and sum over S of p d, plus d_y outside, an unbiased estimate of the KL.
    """
    student_logps, teacher_logps = support_logps(tokens)
    head = expectation(student_logps.exp(), log_difference(student_logps, teacher_logps).detach())
    _, cost = _tail_log_ratio(tokens)
    return Estimate(loss_BT=head + cost * upcast(tokens.student_logps_BT), kl_BT=head.detach() + cost)


@register_estimator(
    "head_and_tail_published",
    target="reverse_kl",
    needs="support",
    source="EMA-PG, arXiv:2602.04417; arXiv:2603.25562 (tail sampling)",
    check=allow(k=whole()),
    at_equal="never",
    on_policy=True,
    variants=(
        Variant({"corrected": True}, "with the missing one it is unbiased", unbiased=True, at_equal="expectation"),
        *OTHER_SUPPORTS,
    ),
)
def head_and_tail_published(
    tokens: TokenBatch, *, k: int = 16, support: str = "teacher", corrected: bool = False
) -> Estimate:
    """Sum K tokens and sample the tail as published, BIASED by the gradient of the student's mass on the K.

    Formula, with d = log p - log q, only the tail's detached: loss_t = sum over S of p d, plus (d_y + c) log p(y) if
    the sampled token y is outside S. The head is differentiated through log p, which adds the gradient of the mass on
    S; it stays unless c = 1, and then costs variance. `head_and_tail` has neither.

    Args:
        tokens: support and sampled log-probabilities under the full softmax, [..., K] and [...], nats, and the ids.
        k: size of the support.
        support: whose most probable tokens.
        corrected: c = 1, unbiased, instead of c = 0, as published.

    Returns:
        Surrogate loss, and sum over S of p d, plus d_y outside, an unbiased estimate of the KL.
    """
    student_logps, teacher_logps = support_logps(tokens)
    head = reverse_kl(student_logps, teacher_logps)
    outside, log_ratio = _tail_log_ratio(tokens)
    cost = log_ratio + outside if corrected else log_ratio
    return Estimate(loss_BT=head + cost * upcast(tokens.student_logps_BT), kl_BT=head.detach() + log_ratio)


@register_estimator(
    "resopd",
    target="reverse_kl",
    unbiased=True,
    needs="support",
    source="as described of ResOPD, arXiv:2610.04882",
    check=allow(k=whole()),
    on_policy=True,
    variants=OTHER_SUPPORTS,
)
def resopd(tokens: TokenBatch, *, k: int = 16, support: str = "teacher") -> Estimate:
    """Sum the reverse KL over K tokens and a bucket of all others, and sample no more than what the bucket hides.

    Formula, with P and Q the masses on the support S, d = log p - log q, b = log((1 - P) / (1 - Q)) and y the sampled
    token: loss_t = sum over S of p d, plus (1 - P) b, plus r log p(y) if y is outside S, with r = d_y - b detached. The
    first two are `topk_tail_reverse_kl`, differentiated; r is the log-ratio inside the tail, log p(y | tail) - log q(y
    | tail). Over y ~ p the expected gradient is that of KL(student || teacher) at the position, whatever S is; what
    stands for 1 - Q cancels there, so that rounding it costs no bias. It asks the teacher for the numbers of
    `head_and_tail`, with most often less variance on the teacher's support, and most often more on the student's.

    Args:
        tokens: support and sampled log-probabilities under the full softmax, [..., K] and [...], nats, and the ids.
        k: size of the support.
        support: whose most probable tokens.

    Returns:
        Surrogate loss, and sum over S of p d, plus (1 - P) b, plus r outside, an unbiased estimate of the KL.
    """
    student_logps, teacher_logps = support_logps(tokens)
    head_and_bucket = support_divergence(student_logps, teacher_logps, divergence="reverse_kl", mass="tail")
    bucket_log_ratio = (outside_logp(student_logps) - outside_logp(teacher_logps)).detach()
    outside, log_ratio = _tail_log_ratio(tokens)
    residual = torch.where(outside, log_ratio - bucket_log_ratio, 0.0)
    loss = head_and_bucket + residual * upcast(tokens.student_logps_BT)
    return Estimate(loss_BT=loss, kl_BT=head_and_bucket.detach() + residual)


def _check_entropy_aware(k: int, entropy_threshold: float, mass: str) -> None:
    check_k(k, mass)
    at_least(0).check("entropy_threshold", entropy_threshold)
    one_of(MASSES).check("mass", mass)


@register_estimator(
    "entropy_aware",
    needs="support+entropy",
    source="as described in arXiv:2603.07079",
    check=_check_entropy_aware,
    on_policy=True,
    variants=(
        Variant({"entropy_threshold": 100.0}, "above any entropy it is `token`", target="reverse_kl", unbiased=True),
        Variant({"mass": "truncate"}, "raises the mass of the support, even at p = q", at_equal="never"),
        Variant({"mass": "tail"}, "with a residual symbol"),
    ),
)
def entropy_aware(
    tokens: TokenBatch, *, k: int = 16, entropy_threshold: float = 0.8, mass: str = "renormalise"
) -> Estimate:
    """Add a top-K forward KL where the teacher hesitates, which keeps diversity and changes the gradient.

    Formula, with H the teacher's entropy and S its K most probable tokens: loss_t = d_t log p(y_t) + [H > threshold]
    KL_S(teacher || student), the second as in `functional.support.support_divergence`. Threshold and `mass` are
    choices of ours. The published forward KL is described not to rest at the teacher (ReTaCo, arXiv:2609.39275): with
    both sides renormalised, as here by default, or with the residual symbol of that paper, `tail`, it does.

    Args:
        tokens: support and sampled log-probabilities under the full softmax, [..., K] and [...], nats, and entropies.
        k: size of the support.
        entropy_threshold: nats above which the forward KL is added.
        mass: what the forward KL does about the tokens outside: `renormalise`, `truncate`, `tail` or `generalised`.
    """
    assert tokens.teacher_entropy_BT is not None
    reverse = sampled_reverse_kl(tokens)
    forward = support_divergence(*support_logps(tokens), tokens.support_mask_BTK, divergence="forward_kl", mass=mass)
    hesitates = upcast(tokens.teacher_entropy_BT) > entropy_threshold
    return Estimate(reverse.loss_BT + torch.where(hesitates, forward, 0.0), reverse.kl_BT)
