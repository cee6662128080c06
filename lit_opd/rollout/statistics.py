"""Compute numbers of a rollout that warn of length inflation and loops.

The training module logs them for every rollout, summed over all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.rollout.judging import Verifier, failed
from lit_opd.types import FinishReason, Rollout

__all__ = ["repetition", "rollout_sums"]

NGRAM = 4


def repetition(ids_BT: Tensor, mask_BT: Tensor, n: int = NGRAM) -> Tensor:
    """Compute the share of each completion's n-grams that occurred earlier in it.

    The mask is True at real tokens, a prefix of each row. The share, [B], goes from 0 (all distinct, or shorter than n)
    to nearly 1 (a loop).
    """
    shares = []
    for row, length in zip(ids_BT.tolist(), mask_BT.sum(1).tolist(), strict=True):
        grams = [tuple(row[i : i + n]) for i in range(length - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(shares, dtype=torch.float32, device=ids_BT.device)


def rollout_sums(rollout: Rollout, verifier: Verifier | None = None) -> dict[str, Tensor]:
    """Sum length, truncation, ends by a stop token and repetition over the student's sequences, and count these.

    Errors of a verifier that gave rewards are summed too, where they do not end the run.

    Demonstrations, which the student did not write, are left out.
    """
    # The author of the first token is that of the row.
    own_B, failed_B = rollout.student_wrote_BT[:, 0], failed(verifier, rollout)
    errors = {} if failed_B is None else {"verifier_error_frac": failed_B[own_B].sum()}
    if not own_B.all():
        rollout = rollout.rows(torch.nonzero(own_B).flatten())
    stopped_B = rollout.finish_B == FinishReason.STOP
    return {
        "rows": torch.tensor(len(rollout), device=stopped_B.device),
        "length": rollout.real_BT.sum(),
        "truncated_frac": (~stopped_B).sum(),
        "eos_frac": stopped_B.sum(),
        "repetition_frac": repetition(rollout.ids_BT, rollout.real_BT).sum(),
        **errors,
    }
