"""Make targets between student and teacher, for the estimators `taid` and `veto`."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import SHARE

__all__ = ["interpolate_logps"]


def interpolate_logps(student_logps: Tensor, teacher_logps: Tensor, teacher_share: float) -> Tensor:
    """Mix student and teacher geometrically into a target that is nearer than the teacher, and held fixed.

    log m = (1 - t) log p + t log q - log Z, the mixture of logits [..., V], with t = `teacher_share` in [0, 1] and no
    gradient. Only with the forward KL is m an objective of its own: KL(p || m) has t times the gradient of KL(p || q),
    as log p - log m = t (log p - log q) + log Z, so that for the reverse KL a nearer target is nothing but a smaller
    step. Between the ends it is -inf where either is, and NaN where the two have no token in common. Source: TAID,
    arXiv:2501.16937 (interpolated logits); Veto, arXiv:2601.07155 (geometric intermediate target).

    >>> interpolate_logps(torch.tensor([0.2, 0.8]).log(), torch.tensor([0.8, 0.2]).log(), 0.5).exp()
    tensor([0.5000, 0.5000])
    """
    SHARE.check("teacher_share", teacher_share)
    student_logps, teacher_logps = upcast(student_logps).detach(), upcast(teacher_logps).detach()
    # 0 * -inf is no number: the ends are returned, not computed.
    if teacher_share == 0:
        return student_logps
    if teacher_share == 1:
        return teacher_logps
    return torch.log_softmax((1 - teacher_share) * student_logps + teacher_share * teacher_logps, dim=-1)
