"""The student's forward pass and the estimator's terms: from a scored rollout to a loss.

Estimators of the `token` family are evaluated inside the head's chunks, where logits exist. Others need the layout of
sequences: for them a first pass over the head, without gradient, gives log-probabilities [B, T]; differentiating their
loss with respect to these gives one coefficient a token, and the second pass applies coefficient x log p(y_t). Both
kinds meet in one loop over chunks, so a mix projects no more often than its most expensive term.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.functional import Head, position_losses
from lit_opd.functional.head import Stats
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.scoring import CountedPositions, needs_of, support_size_of
from lit_opd.types import Rollout, ScoredRollout, TokenBatch

__all__ = ["student_loss"]

Terms = list[tuple[float, BoundEstimator]]


def student_loss(
    student: LanguageModel,
    micro: ScoredRollout,
    teacher_head: Head,
    estimator: BoundEstimator,
    weights_BT: Tensor,
    rows: int,
) -> tuple[Tensor, Stats]:
    """The weighted sum of the estimator's per-token losses over a micro-batch.

    Args:
        student: the model that learns.
        micro: completions, of which only counted positions reach the head, with their scores and rewards.
        teacher_head: the teacher's output layer.
        estimator: one estimator, or a mix.
        weights_BT: [B, T] weight of every token, from `functional.token_weights`.
        rows: positions a chunk of the head.

    Returns:
        A scalar to differentiate, and per-position detached values [N]: `kl` (the estimator's), `student_logps`,
        `teacher_logps`.
    """
    rollout, scores, rewards_B = micro
    mask_BT = rollout.mask_BT
    hidden_NH = student.completion_hidden(rollout)[mask_BT]
    weights_N = weights_BT[mask_BT]
    positions = CountedPositions(
        rollout.completion_ids_BT[mask_BT], rollout.sampler_logps_BT[mask_BT], scores, teacher_head,
        needs_of(estimator), support_size_of(estimator),
    )  # fmt: skip
    local = [(weight, term) for weight, term in estimator.terms if term.spec.family == "token"]
    spread = [(weight, term) for weight, term in estimator.terms if term.spec.family != "token"]
    share = sum(weight for weight, _ in estimator.terms)
    value, coefficients_N, spread_kl_N = _sequence_terms(
        spread, rollout, positions, hidden_NH, student.head, weights_BT, rows, rewards_B
    )

    def chunk_loss(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        tokens = positions.tokens(logits_cV, part)
        logps, kl = tokens.student_logps_BT, spread_kl_N[part]
        loss = (coefficients_N[part] * (logps - logps.detach())).sum()
        for weight, term in local:
            estimate = term(_narrow(tokens, term))
            loss = loss + weight * (weights_N[part] * estimate.loss_BT).sum()
            kl = kl + weight * estimate.kl_BT
        return loss, {"kl": kl / share, "student_logps": logps, "teacher_logps": tokens.teacher_logps_BT}

    loss, stats = position_losses(hidden_NH, student.head, chunk_loss, rows)
    return loss + value, stats


def _narrow(tokens: TokenBatch, term: BoundEstimator) -> TokenBatch:
    # A mix may hold several support sizes; the teacher's K most probable are the first K of more.
    ids = tokens.support_ids_BTK
    if ids is None or not term.spec.needs.startswith("support") or ids.shape[-1] == term.support_size:
        return tokens
    names = ("support_ids_BTK", "student_support_logps_BTK", "teacher_support_logps_BTK")
    return replace(tokens, **{name: getattr(tokens, name)[..., : term.support_size] for name in names})


def _sequence_terms(
    terms: Terms,
    rollout: Rollout,
    positions: CountedPositions,
    hidden_NH: Tensor,
    head: Head,
    weights_BT: Tensor,
    rows: int,
    rewards_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, coefficient of each log-probability, and weighted KL estimates of the terms that see sequences."""
    mask_BT, zeros_N = rollout.mask_BT, torch.zeros_like(positions.sampler_logps_N)
    if not terms:
        return zeros_N.sum(), zeros_N, zeros_N
    tokens = _sequence_tokens(rollout, positions, hidden_NH, head, rows, rewards_B)
    with torch.enable_grad():
        value, kl_BT = zeros_N.sum(), torch.zeros_like(tokens.student_logps_BT)
        for weight, term in terms:
            estimate = term(tokens)
            counted_BT = torch.where(mask_BT, estimate.loss_BT, 0.0)
            value, kl_BT = value + weight * (weights_BT * counted_BT).sum(), kl_BT + weight * estimate.kl_BT
    (coefficients_BT,) = torch.autograd.grad(value, tokens.student_logps_BT)
    return value.detach(), coefficients_BT[mask_BT], kl_BT[mask_BT].detach()


@torch.no_grad()
def _sequence_tokens(
    rollout: Rollout, positions: CountedPositions, hidden_NH: Tensor, head: Head, rows: int, rewards_B: Tensor | None
) -> TokenBatch:
    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        tokens = positions.tokens(logits_cV, part)
        stats = {"student": tokens.student_logps_BT, "teacher": tokens.teacher_logps_BT}
        return logits_cV.new_zeros(()), stats | ({} if tokens.kl_BT is None else {"kl": tokens.kl_BT})

    def spread(values_N: Tensor) -> Tensor:
        blank_BT = values_N.new_zeros(rollout.mask_BT.shape)
        return blank_BT.masked_scatter(rollout.mask_BT, values_N)

    _, stats = position_losses(hidden_NH, head, read, rows)
    return TokenBatch(
        student_logps_BT=spread(stats["student"]).requires_grad_(),
        teacher_logps_BT=spread(stats["teacher"]),
        sampler_logps_BT=rollout.sampler_logps_BT,
        mask_BT=rollout.mask_BT,
        kl_BT=spread(stats["kl"]) if "kl" in stats else None,
        rewards_B=rewards_B,
    )
