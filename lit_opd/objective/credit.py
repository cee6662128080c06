"""Sketch what each completion adds to the gradient of the output layer, under several estimators at once.

The callback `ChooseGamma` calls it, to compare discounts without a backward pass for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.functional import position_losses
from lit_opd.functional.head import Stats
from lit_opd.functional.tradeoff import gradient_sketch
from lit_opd.models import LanguageModel
from lit_opd.objective.counted import CountedPositions
from lit_opd.objective.loss import sequence_tokens
from lit_opd.types import ScoredRollout

__all__ = ["credit_sketches"]


@torch.no_grad()
def credit_sketches(
    student: LanguageModel,
    micro: ScoredRollout,
    candidates: Sequence[BoundEstimator],
    weights_BT: Tensor,
    rows: int,
    size: int = 16,
    seed: int = 0,
) -> Tensor:
    """Sketch every completion's gradient with respect to the student's head, linearly and at random.

    All candidates share one forward pass: they differ only in the coefficient they give to each token.

    Args:
        student: the model that learns.
        micro: completions with their scores.
        candidates: M estimators that see whole sequences, with the same needs.
        weights_BT: [B, T] weight of every token in the loss.
        rows: positions a chunk of the head.
        size: R; the sketch has R * R numbers, whose inner products are those of the gradients on average.
        seed: of the random projections.

    Returns:
        [M, B, R * R] in fp32 or wider.
    """
    mask_BT = micro.rollout.mask_BT
    hidden_NH, head = student.hidden(micro.rollout)
    positions = CountedPositions.of(micro)
    project_VR, project_HR = (_signs(n, size, seed + i, hidden_NH) for i, n in enumerate(head.weight_VH.shape))

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        errors_cV = torch.softmax(logits_cV, dim=-1).neg_()
        taken_c1 = positions.ids_N[part, None]
        errors_cV.scatter_add_(1, taken_c1, torch.ones_like(taken_c1, dtype=errors_cV.dtype))
        return logits_cV.new_zeros(()), {"errors": (errors_cV * head.slope(logits_cV)) @ project_VR}

    _, stats = position_losses(hidden_NH, head, read, rows)
    features_NF = gradient_sketch(hidden_NH, stats["errors"], project_HR)
    tokens = sequence_tokens(candidates[0], micro, positions, hidden_NH, head, rows)
    row_of_N = torch.nonzero(mask_BT)[:, 0]
    sketches = []
    for candidate in candidates:
        with torch.enable_grad():
            loss = (weights_BT * torch.where(mask_BT, candidate(tokens).loss_BT, 0.0)).sum()
            (coefficients_BT,) = torch.autograd.grad(loss, tokens.student_logps_BT)
        blank_BF = features_NF.new_zeros(len(mask_BT), features_NF.shape[1])
        sketches.append(blank_BF.index_add(0, row_of_N, coefficients_BT[mask_BT][:, None] * features_NF))
    return torch.stack(sketches)


def _signs(count: int, size: int, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, size), generator=generator).to(like.device) * 2 - 1
    return signs.to(torch.float64 if like.dtype == torch.float64 else torch.float32) / size**0.5
