"""Estimators that aim at another distribution than the teacher's: nearer to the student, or cut to K tokens.

All go by the forward KL. In the reverse direction a geometric target only scales the gradient: KL(p || m) with m
proportional to p^(1 - t) q^t has t times the gradient of KL(p || q).

>>> from dataclasses import replace
>>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()  # one position, two tokens
>>> tokens = TokenBatch(
...     p[:, 0], q[:, 0], p[:, 0], torch.tensor([True]), student_full_logps_BTV=p, teacher_full_logps_BTV=q
... )
>>> for progress in (0.0, 1.0):  # of training: from a target half way to the teacher itself
...     print(taid(replace(tokens, progress=progress), start=0.5).loss_BT)
tensor([0.0363])
tensor([0.1308])
"""

from __future__ import annotations

import torch

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.full import full_logps, with_exact_kl
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.topk import OTHER_SUPPORTS, sampled_log_ratio, support_logps
from lit_opd.functional.divergences import forward_kl, renormalise
from lit_opd.functional.interpolation import interpolate_logps
from lit_opd.functional.ranges import POSITIVE_SHARE, SHARE, allow, whole
from lit_opd.types import Estimate, TokenBatch


@register_estimator(
    "taid",
    needs="full",
    source="TAID, arXiv:2501.16937, with a linear schedule",
    check=allow(start=SHARE),
    variants=(Variant({"start": 1.0}, "it is the forward KL", target="forward_kl", unbiased=True),),
)
def taid(tokens: TokenBatch, *, start: float = 0.4) -> Estimate:
    """Follow a target that wanders from student to teacher in training by the forward KL, with small gaps throughout.

    Formula, with t = start + (1 - start) x the share of training done, and m proportional to p^(1 - t) q^t, held
    fixed: loss_t = KL(m || p). Its gradient by the logits is p - m. The share grows linearly; the adaptive schedule of
    the paper, which needs the losses of earlier steps, is not here.

    Args:
        tokens: full log-probabilities, [..., V], nats, and the progress of training.
        start: the teacher's share at the beginning of training, 0 to 1; at its end the target is the teacher.
    """
    return veto(tokens, teacher_share=start + (1 - start) * tokens.progress)


@register_estimator(
    "veto",
    needs="full",
    source="as described in Veto, arXiv:2601.07155",
    check=allow(teacher_share=POSITIVE_SHARE._replace(hint="without the teacher, the target is the student itself")),
    variants=(Variant({"teacher_share": 1.0}, "it is the forward KL", target="forward_kl", unbiased=True),),
)
def veto(tokens: TokenBatch, *, teacher_share: float = 0.5) -> Estimate:
    """Follow the geometric mean of student and teacher by the forward KL, where what the student rules out stays so.

    Formula, with t = `teacher_share` and m proportional to p^(1 - t) q^t, held fixed: loss_t = KL(m || p). Its gradient
    by the logits is p - m: zero only at the teacher, as for the forward KL, but small on tokens either side holds
    improbable.

    Args:
        tokens: full log-probabilities, [..., V], nats.
        teacher_share: t, above 0 to 1.
    """
    student_logps, teacher_logps = full_logps(tokens)
    target_logps = interpolate_logps(student_logps, teacher_logps, teacher_share)
    return with_exact_kl(tokens, forward_kl(student_logps, target_logps))


@register_estimator(
    "topk_soft_targets",
    target="forward_kl",
    needs="support",
    source="SDFT, arXiv:2601.19897",
    check=allow(k=whole()),
    at_equal="never",
    variants=OTHER_SUPPORTS,
)
def topk_soft_targets(tokens: TokenBatch, *, k: int = 16, support: str = "teacher") -> Estimate:
    """Imitate the teacher cut to K tokens and renormalised, so that the student learns to write nothing else.

    Formula, with q' the teacher renormalised over S and p not: loss_t = sum over S of q' (log q' - log p), that is
    KL(q' || p), which has the gradient of the cross-entropy and is zero at its optimum, the truncated teacher. At
    p = q the gradient is minus that of the log of the student's mass on S.

    Args:
        tokens: support log-probabilities under the full softmax, [..., K], nats.
        k: size of the support.
        support: whose most probable tokens.
    """
    student_logps, teacher_logps = support_logps(tokens)
    # Over an empty support the renormalised teacher is NaN: its tokens are as impossible as they were before.
    target_logps = renormalise(teacher_logps).masked_fill(teacher_logps.isneginf(), -torch.inf)
    return Estimate(forward_kl(student_logps, target_logps), sampled_log_ratio(tokens))
