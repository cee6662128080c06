"""Keep a ledger of several teachers: how much each of them taught in a step, and where they contradict each other.

The module logs tokens and KLs at every step, `callbacks.TeacherGradients` now and then what only gradients tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from lit_opd.measures.steps import Seen

__all__ = ["gradient_report", "teacher_report", "teacher_sums"]


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


def gradient_report(gradients_GD: Tensor, taught_GM: Tensor, teachers: Sequence[str]) -> dict[str, float]:
    """Name what the parts of a step's gradient tell, each of which comes from the rows of the same teachers.

    A gradient towards a mixture is no sum of gradients towards its teachers: rows that have several teachers are a part
    of their own, whose NAME is that of all of them, as `a and b`.

    Args:
        gradients_GD: parts of the gradient, or sketches of them, of which some may be of the same teachers.
        taught_GM: which teachers each part is of.
        teachers: their names.

    Returns:
        `teacher/NAME/gradient_share`: the inner product of a part with the whole gradient over the squared norm of the
        whole. Shares add up to 1, and one below 0 is of a part against which the step goes. `gradient_cosine/NAME/NAME`
        of every two parts. What a gradient of zero leaves without a value is left out.
    """
    named = [" and ".join(teachers[m] for m in taught_M.nonzero().flatten().tolist()) for taught_M in taught_GM]
    names = sorted(set(named))
    wide_GD, part_G = gradients_GD.double(), [names.index(name) for name in named]
    parts_CD = wide_GD.new_zeros(len(names), wide_GD.shape[1])
    parts_CD.index_add_(0, torch.tensor(part_G, device=wide_GD.device), wide_GD)
    gram_CC = parts_CD @ parts_CD.T
    whole, norms = float(gram_CC.sum()), gram_CC.diagonal().sqrt()
    report: dict[str, float] = {}
    if whole > 0:
        report = {
            f"teacher/{n}/gradient_share": float(row_C.sum()) / whole for n, row_C in zip(names, gram_CC, strict=True)
        }
    for i, j in combinations(range(len(names)), 2):
        if norms[i] > 0 and norms[j] > 0:
            report[f"gradient_cosine/{names[i]}/{names[j]}"] = float(gram_CC[i, j] / (norms[i] * norms[j]))
    return report
