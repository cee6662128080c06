"""Prove that the fused head computes what the plain one does, on positions of the run itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.fast_paths import Verdict, prove
from lit_opd.functional import compute_dtype
from lit_opd.functional.fused_head import fused_rows
from lit_opd.kernels import why_not
from lit_opd.models import LanguageModel
from lit_opd.objective.chunks import why_plain
from lit_opd.objective.counted import CountedPositions
from lit_opd.objective.loss import head_loss
from lit_opd.types import ScoredRollout

__all__ = ["FUSED_HEAD", "prove_head"]

FUSED_HEAD = "fused head"
# Both paths round the gradient by the logits to 16 bits at the same place. What they round differs by 1e-5, as sums in
# fp32 do, so that one number in 500 goes to the other neighbour, 2^-8 to 2^-7 away: 2e-4 of the norm. The bound is ten
# times that. In fp32 nothing is rounded there, and the bound is ten times 1e-5.
_ROUNDED, _EXACT = 2**-9, 1e-4


def prove_head(
    student: LanguageModel, micro: ScoredRollout, estimator: BoundEstimator, rows: int, choice: str = "auto"
) -> Verdict:
    """Run the fused and the plain head on whole prompts of a scored micro-batch, as many as make a fused chunk.

    Compared are the loss, every value that is logged, and the gradients by hidden states and head. The student's
    hidden states are taken in reverse order: where the models agree, as at the start of a self-distillation, gradients
    are nothing but rounding. No gradient is left behind.

    Args:
        student: in the mode and precision in which it trains.
        micro: of the run, scored for this estimator.
        estimator: that of the run.
        rows: positions a chunk of the plain head.
        choice: that of `paths.prove`.
    """
    device = micro.rollout.mask_BT.device
    if choice == "auto" and device.type == "cpu":
        return prove(FUSED_HEAD, list, list, 0.0, device, choice, unfit="kernels do not run on cpu")
    part = _first(micro, fused_rows(rows, student.vocabulary))
    with torch.no_grad():
        hidden_NH, _ = student.hidden(part.rollout)
    head = student.head  # not that of the pass, which has no gradient where weights are tied
    hidden_NH = hidden_NH.flip(0).requires_grad_()
    sources = [x for x in (hidden_NH, head.weight_VH, head.bias_V) if x is not None and x.requires_grad]
    mask_BT = part.rollout.mask_BT
    weights_BT = mask_BT / mask_BT.sum().clamp(min=1)

    def run(fused: bool) -> list[Tensor]:
        loss = head_loss(hidden_NH, head, part, estimator, weights_BT, rows, fused)
        return [loss.value.detach(), *loss.stats.values(), *torch.autograd.grad(loss.value, sources)]

    dtype = compute_dtype(hidden_NH)
    unfit = why_not(device) or why_plain(estimator, CountedPositions.of(part), dtype)
    bound = _ROUNDED if dtype.itemsize == 2 else _EXACT
    return prove(FUSED_HEAD, lambda: run(fused=False), lambda: run(fused=True), bound, device, choice, unfit)


def _first(micro: ScoredRollout, positions: int) -> ScoredRollout:
    """Choose whole prompts, in the order of their rows, with so many counted positions or all there are."""
    rollout = micro.rollout
    before_B = rollout.mask_BT.sum(1).cumsum(0) - rollout.mask_BT.sum(1)
    prompts = rollout.prompt_index_B[before_B < positions]
    return micro.rows(torch.isin(rollout.prompt_index_B, prompts).nonzero().flatten())
