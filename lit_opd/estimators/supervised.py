"""Learn from completions that the student did not write.

They are the share of a rollout that `rollout.student_share` leaves to demonstrations.

>>> p = torch.tensor([[0.5, 0.25]]).log()
>>> tokens = TokenBatch(p, p, p, torch.ones_like(p).bool(), student_wrote_BT=torch.tensor([[True, False]]))
>>> supervised(tokens).loss_BT
tensor([[0.0000, 1.3863]])
"""

from __future__ import annotations

import torch

from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.precision import upcast
from lit_opd.types import Estimate, TokenBatch


@register_estimator(
    "supervised",
    source="sequence-level distillation, arXiv:1606.07947; the supervised share of GKD, arXiv:2306.13649",
    on_policy=False,
)
def supervised(tokens: TokenBatch) -> Estimate:
    """Imitate demonstrations, which says nothing of the student's own mistakes but reaches where it never goes.

    Formula: loss_t = -log p(y_t) at tokens of demonstrations (`rollout.student_share` below 1), 0 at the student's own.
    Where the teacher wrote them, the expected gradient is that of KL(teacher || student) at the teacher's prefixes.
    Meant as a term of a `mix`.
    """
    student_logps = upcast(tokens.student_logps_BT)
    log_ratio = student_logps.detach() - upcast(tokens.teacher_logps_BT)
    wrote = tokens.student_wrote_BT
    own = torch.ones_like(tokens.mask_BT) if wrote is None else wrote
    return Estimate(loss_BT=torch.where(own, 0.0, -student_logps), kl_BT=log_ratio)
