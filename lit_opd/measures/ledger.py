"""Keep a ledger of several teachers: how much each of them taught in a step.

The module calls it at every step, and logs it beside the numbers of `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_opd.measures.steps import Seen

__all__ = ["teacher_report", "teacher_sums"]


def teacher_sums(seen: Sequence[Seen], teachers: Sequence[str]) -> dict[str, Tensor]:
    """Sum values over the counted tokens that the student wrote, each times the weight that a teacher has there.

    Returns:
        For every teacher `NAME/tokens` and `NAME/kl`, of the estimator's KL; nothing where there is one teacher only.
    """
    sums: dict[str, Tensor] = {}
    for rollout, stats in seen if teachers else ():
        assert rollout.routes_BM is not None
        own_N, row_N = rollout.own_mask_BT[rollout.mask_BT], torch.nonzero(rollout.mask_BT)[:, 0]
        weights_NM = rollout.routes_BM[row_N] * own_N[:, None]
        kl_M = torch.where(weights_NM > 0, weights_NM * stats["kl"][:, None], 0.0).sum(0)
        for name, tokens, kl in zip(teachers, weights_NM.sum(0), kl_M, strict=True):
            sums[f"{name}/tokens"] = tokens + sums.get(f"{name}/tokens", 0)
            sums[f"{name}/kl"] = kl + sums.get(f"{name}/kl", 0)
    return sums


def teacher_report(update: Mapping[str, float], teachers: Sequence[str]) -> dict[str, float]:
    """Name what is logged of every teacher, from the sums over all processes.

    Returns:
        `teacher/NAME/tokens`; `teacher/NAME/reverse_kl`, the mean of the estimator's KL, not a number where the teacher
        had no token; and `teacher/NAME/kl_share`, its part of the sum of that KL over all teachers, which says what
        the loss is about: the value of a surrogate loss need not mean anything.
    """
    total = sum(update[f"{name}/kl"] for name in teachers)
    report: dict[str, float] = {}
    for name in teachers:
        tokens, kl = update[f"{name}/tokens"], update[f"{name}/kl"]
        report |= {
            f"teacher/{name}/tokens": tokens,
            f"teacher/{name}/reverse_kl": kl / (tokens or math.nan),
            f"teacher/{name}/kl_share": kl / (total or math.nan),
        }
    return report
