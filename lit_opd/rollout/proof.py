"""Prove before the first update that sampler and trainer read the same student.

An engine records how probable each token was when it was drawn. The trainer computes the same numbers from the same
weights in one pass, so only rounding may tell them apart. A larger gap is a server with other weights, dropout, or an
architecture that decodes otherwise than it scores. The module asks for it once a run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.functional import compute_dtype, law_logps, position_losses
from lit_opd.functional.head import Stats
from lit_opd.models import LanguageModel
from lit_opd.rollout.engine import RolloutEngine
from lit_opd.rollout.local import LocalEngine
from lit_opd.types import Rollout

__all__ = ["check_gap", "gap_sums"]

# The most that the gap of a token may be, in nats (root of the mean square): where this process computes in full fp32,
# which gives 1e-6, and for all other arithmetic. Rounding to bf16 gives 1e-3 to 1e-2, and more where it moves a token
# to other experts.
_EXACT, _ROUNDED = 1e-4, 0.2
_ROWS = 4


@torch.no_grad()
def gap_sums(student: LanguageModel, rollout: Rollout, rows: int) -> dict[str, Tensor]:
    """Sum the squared gap between sampler and trainer over a few of the student's completions, short to long.

    The student is in the mode in which it trains, and its head projects so many rows at once. Every process runs one
    pass, whatever it sampled, because sharded weights need all processes.

    Returns:
        `squares`, the sum of squared differences in nats, and `tokens`, their number. Tokens that a truncated law
        excludes after rounding, or that `min_new_tokens` protected, are left out.
    """
    own_B = rollout.own_mask_BT.sum(1)
    own = torch.nonzero(own_B).flatten() if own_B.any() else own_B.argsort()
    ordered = own[own_B[own].argsort()]
    part = rollout.rows(ordered[torch.linspace(0, len(ordered) - 1, _ROWS, device=own.device).long()])
    late_T = torch.arange(part.ids_BT.shape[1], device=part.ids_BT.device) >= part.law.min_new_tokens
    part = replace(part, mask_BT=part.own_mask_BT & late_T)
    ids_N, sampler_N = part.ids_BT[part.mask_BT], part.sampler_logps_BT[part.mask_BT]

    def read(logits_cV: Tensor, chunk: slice) -> tuple[Tensor, Stats]:
        logps_c = law_logps(logits_cV, part.law).gather(-1, ids_N[chunk, None]).squeeze(-1)
        return logits_cV.new_zeros(()), {"logps": logps_c}

    # Dropout that was asked for is no mistake. All else that sets training apart from sampling is.
    with student.evaluating() if student.model.training else student.present():
        hidden_NH, head = student.hidden(part)
        stats = position_losses(hidden_NH, head, read, rows)[1]
    gap_N = (stats.get("logps", sampler_N) - sampler_N).abs()
    known_N = gap_N != torch.inf
    return {"squares": gap_N[known_N].square().sum(), "tokens": known_N.sum()}


def check_gap(student: LanguageModel, engine: RolloutEngine, squares: float, tokens: float) -> None:
    """Refuse to train where the gap between sampler and trainer, summed over all processes, is more than rounding.

    Raises:
        UserError: naming the gap, its bound and the likely cause.
    """
    gap = (squares / max(tokens, 1)) ** 0.5
    here = isinstance(engine, LocalEngine)
    wide = compute_dtype(student.head.weight_VH[:0]).itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"
    bound = _EXACT if here and wide and not student.is_quantised else _ROUNDED
    if not gap > bound:  # a gap that is no number is a model's, which the step tells with its batch
        return
    expected = f"sampler and trainer to give a token of the student one log-probability, to {bound:g} nats"
    found = f"{gap:.2g} nats between them (root of the mean square over {tokens:.0f} tokens)"
    if here:
        cause = f"{type(student.body).__name__} decodes otherwise than it scores: name another student."
        raise UserError("student.path", expected, found, cause)
    remedy = "The engine holds other weights, or computes otherwise: compare rollout.engine=local."
    raise UserError("rollout.engine", expected, found, remedy)
