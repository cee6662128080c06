"""Make the loss of a micro-batch: the student's forward pass, then the estimator's terms.

Estimators of the `token` family are evaluated inside the head's chunks, where logits exist. Others need the layout of
sequences: for them a first pass over the head, without gradient, gives log-probabilities [B, T]; differentiating their
loss with respect to these gives one coefficient a token, and the second pass applies coefficient x log p(y_t). The same
first pass gives the weights of terms that have them. Both kinds meet in one loop over chunks, so a mix projects no more
often than its most expensive term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator, Term, any_clipped
from lit_opd.estimators.asking import ask, ask_factors
from lit_opd.estimators.needs import Seen, fill, needs_of
from lit_opd.estimators.topk import support_logps
from lit_opd.functional import Head, merge_ids, support_mass
from lit_opd.functional.head import Stats
from lit_opd.models import LanguageModel
from lit_opd.objective.chunks import AnyChunk, SumChunks, chunk_sums
from lit_opd.objective.counted import CountedPositions
from lit_opd.types import ScoredRollout, TokenBatch

__all__ = ["Loss", "head_loss", "sequence_tokens", "student_loss", "support_masses"]


class Loss(NamedTuple):
    """The loss of a micro-batch.

    Attributes:
        value: a scalar to differentiate.
        stats: per-position detached values [N]: `kl` (the estimator's), `student_logps`, `teacher_logps`,
            `sampler_logps`, of groups where tokens are merged; `clipped`, 1 where a limit changed a term and else 0,
            where a term has one; `student_mass` and `teacher_mass`, each model's probability on the support, where a
            term compares one; `aligned`, 1 where the teacher has the same token, where it reads others.
        hidden_NH: the last hidden states that the loss was read from, for gradients there.
    """

    value: Tensor
    stats: Stats
    hidden_NH: Tensor


def student_loss(
    student: LanguageModel, micro: ScoredRollout, estimator: BoundEstimator, weights_BT: Tensor, rows: int,
    fused: bool = False,
) -> Loss:  # fmt: skip
    """Sum the estimator's per-token losses over a micro-batch, each times its weight of `functional.token_weights`.

    Only counted positions reach the head, `rows` of them at once, or as many more as fit there where the head is
    `fused`: then kernels of `lit_opd.kernels` differentiate its rows, where `fused.why_plain` has nothing against it.
    """
    return head_loss(*student.hidden(micro.rollout), micro, estimator, weights_BT, rows, fused)


def head_loss(
    hidden_NH: Tensor, head: Head, micro: ScoredRollout, estimator: BoundEstimator, weights_BT: Tensor, rows: int,
    fused: bool = False,
) -> Loss:  # fmt: skip
    """Sum the losses as `student_loss`, from the hidden states [N, H] of the counted positions."""
    weights_N = micro.rollout.counted(weights_BT)
    positions = CountedPositions.of(micro)
    sum_chunks = chunk_sums(hidden_NH, head, positions, estimator, rows, fused)
    spread = _spread_terms(estimator, micro, positions, sum_chunks, weights_BT)
    share = sum(term.weight for term in estimator.terms)
    aligned_N = positions.teacher.aligned_N

    def chunk_loss(chunk: AnyChunk) -> tuple[Tensor, Stats]:
        part = chunk.part
        logps, kl = chunk.sampled.student_logps_BT, spread.kl_N[part]
        loss = (spread.coefficients_N[part] * (logps - logps.detach())).sum()
        seen, clips = [], [None if spread.clipped_N is None else spread.clipped_N[part]]
        for term, factor_N in spread.local:
            tokens, estimate = chunk.estimate(term.estimator)
            estimate = estimate.weighted(factor_N[part])
            loss = loss + term.weight * (weights_N[part] * estimate.loss_BT).sum()
            kl = kl + term.weight * estimate.kl_BT
            seen.append(tokens)
            clips.append(estimate.clipped_BT)
        others = {name: getattr(chunk.sampled, f"{name}_BT") for name in ("teacher_logps", "sampler_logps")}
        stats = {"kl": kl / share, "student_logps": logps, **others}
        clipped = any_clipped(clips)
        activity = {} if clipped is None else {"clipped": clipped.to(kl.dtype)}
        activity |= {} if aligned_N is None else {"aligned": aligned_N[part].to(kl.dtype)}
        return loss, stats | activity | support_masses(seen)

    loss, stats = sum_chunks(chunk_loss)
    return Loss(loss + spread.value, stats, hidden_NH)


def support_masses(seen: Sequence[TokenBatch]) -> Stats:
    """Measure each model's probability on the widest support that is compared.

    A student that leaves the support escapes what a divergence on it can see, and a teacher that is hardly on it says
    little. What the terms of an estimator see is of the same positions.

    Returns:
        `student_mass` and `teacher_mass`, [...], 0 to 1, detached. Nothing where no support is compared.
    """
    supports = [support_logps(tokens) for tokens in seen if tokens.support_ids_BTK is not None]
    if not supports:
        return {}
    student_K, teacher_K = max(supports, key=lambda support: support[0].shape[-1])
    return {"student_mass": support_mass(student_K.detach()), "teacher_mass": support_mass(teacher_K)}


class _Spread(NamedTuple):
    """The results of the first pass.

    Attributes:
        value: of the terms that see sequences.
        coefficients_N: derivative of that value by each log-probability.
        kl_N: their weighted KL estimates.
        clipped_N: where a limit changed one of them; None where none has a limit.
        local: the other terms, each with its factor of every token.
    """

    value: Tensor
    coefficients_N: Tensor
    kl_N: Tensor
    clipped_N: Tensor | None
    local: list[tuple[Term, Tensor]]


def _spread_terms(
    estimator: BoundEstimator,
    micro: ScoredRollout,
    positions: CountedPositions,
    sum_chunks: SumChunks,
    weights_BT: Tensor,
) -> _Spread:
    counted, zeros_N = micro.rollout.counted, torch.zeros_like(positions.sampler_logps_N)
    # What learns from the student's samples must not take demonstrations for some.
    own_mask_BT = micro.rollout.own_mask_BT
    own_N, ones_N = counted(own_mask_BT).to(zeros_N.dtype), torch.ones_like(zeros_N)
    if all(term.is_local and term.weighting is None for term in estimator.terms):
        local = [(term, own_N if term.estimator.spec.on_policy else ones_N) for term in estimator.terms]
        return _Spread(zeros_N.sum(), zeros_N, zeros_N, None, local)
    tokens = _sequence_tokens(estimator, micro, positions, sum_chunks)
    local, clips = [], []
    with torch.enable_grad():
        kl_BT = torch.zeros_like(tokens.student_logps_BT)
        value = 0.0 * tokens.student_logps_BT.sum()  # so that it can be differentiated, whatever the terms are
        for term in estimator.terms:
            seen = replace(tokens, mask_BT=own_mask_BT) if term.estimator.spec.on_policy else tokens
            if term.is_local:
                local.append((term, counted(torch.where(seen.mask_BT, ask_factors(term, seen), 0.0))))
                continue
            estimate = ask(term.estimator, seen).weighted(ask_factors(term, seen))
            counted_BT = torch.where(seen.mask_BT, estimate.loss_BT, 0.0)
            value, kl_BT = value + term.weight * (weights_BT * counted_BT).sum(), kl_BT + term.weight * estimate.kl_BT
            clips.append(None if estimate.clipped_BT is None else counted(estimate.clipped_BT & seen.mask_BT))
    (coefficients_BT,) = torch.autograd.grad(value, tokens.student_logps_BT)
    return _Spread(value.detach(), counted(coefficients_BT), counted(kl_BT).detach(), any_clipped(clips), local)


def sequence_tokens(
    estimator: BoundEstimator,
    micro: ScoredRollout,
    positions: CountedPositions,
    hidden_NH: Tensor,
    head: Head,
    rows: int,
) -> TokenBatch:
    """Fill what estimators that see sequences are given: a leaf of student log-probabilities, and what they need."""
    return _sequence_tokens(estimator, micro, positions, chunk_sums(hidden_NH, head, positions, estimator, rows, False))


@torch.no_grad()
def _sequence_tokens(
    estimator: BoundEstimator, micro: ScoredRollout, positions: CountedPositions, sum_chunks: SumChunks
) -> TokenBatch:
    rollout, needs = micro.rollout, estimator.needs

    def read(chunk: AnyChunk) -> tuple[Tensor, Stats]:
        seen = chunk.sampled
        sampled = {name: getattr(seen, f"{name}_logps_BT") for name in ("student", "teacher", "sampler")}
        return seen.student_logps_BT.new_zeros(()), sampled | chunk.summaries(needs)

    def spread(values_N: Tensor) -> Tensor:
        return rollout.spread(values_N, values_N.new_zeros(rollout.mask_BT.shape))

    _, stats = sum_chunks(read)
    tokens = TokenBatch(
        student_logps_BT=spread(stats.pop("student")).requires_grad_(),
        teacher_logps_BT=spread(stats.pop("teacher")),
        sampler_logps_BT=rollout.spread(stats.pop("sampler"), rollout.sampler_logps_BT),
        mask_BT=rollout.mask_BT,
        completion_ids_BT=merge_ids(rollout.ids_BT, micro.merged),
        student_wrote_BT=None if positions.student_wrote_N is None else rollout.student_wrote_BT,
        progress=micro.progress,
        **{name: spread(values_N) for name, values_N in stats.items()},
    )
    seen = Seen(rewards_B=rollout.rewards_B, groups_B=rollout.prompt_index_B)
    return fill(tokens, needs_of(needs, "row"), seen)
