"""The yardsticks: what every run is measured by, whatever its estimator.

Always on completions sampled at temperature 1, untruncated; every divergence is exact over the vocabulary at each
position of these completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional import entropy, forward_kl, jsd, log_softmax, position_losses, reverse_kl
from lit_opd.functional.head import SlicedLogits, Stats
from lit_opd.models.language_model import LanguageModel
from lit_opd.types import Rollout

__all__ = ["YARDSTICKS", "measure_yardsticks"]

YARDSTICKS = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "teacher_nll",
    "top1_agreement",
    "student_entropy",
    "teacher_entropy",
)


@torch.no_grad()
def measure_yardsticks(policy: LanguageModel, teacher: LanguageModel, rollout: Rollout, rows: int) -> Stats:
    """Compare a policy with the teacher, both at temperature 1, at every token of the policy's own completions.

    Args:
        policy: the model that wrote the completions.
        teacher: the frozen model.
        rollout: completions.
        rows: positions a chunk of the head.

    Returns:
        Every name of `YARDSTICKS` (nats; `top1_agreement` is 0 or 1; `jsd` is the plain Jensen-Shannon divergence, at
        most log 2) and `log_ratio` (student minus teacher, nats), each [B, T], zero where not counted.
    """
    policy, teacher, mask_BT = policy.untempered(), teacher.untempered(), rollout.mask_BT
    taken_N1 = rollout.completion_ids_BT[mask_BT][:, None]
    with teacher.evaluating():
        teacher_logits = SlicedLogits(teacher.counted_hidden(rollout), teacher.head, rows)

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        student = log_softmax(logits_cV)
        other = log_softmax(teacher_logits[part])
        teacher_logps = other.gather(-1, taken_N1[part]).squeeze(-1)
        stats = {
            "reverse_kl": reverse_kl(student, other),
            "forward_kl": forward_kl(student, other),
            "jsd": jsd(student, other, teacher_weight=0.5) / 4,
            "teacher_nll": -teacher_logps,
            "top1_agreement": (student.argmax(-1) == other.argmax(-1)).float(),
            "student_entropy": entropy(student),
            "teacher_entropy": entropy(other),
            "log_ratio": student.gather(-1, taken_N1[part]).squeeze(-1) - teacher_logps,
        }
        return logits_cV.new_zeros(()), stats

    # The head too in the policy's own precision, or a teacher would differ from itself.
    with policy.evaluating(), policy.precision():
        _, stats = position_losses(policy.counted_hidden(rollout), policy.head, read, rows)
    blank_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    return {name: blank_BT.masked_scatter(mask_BT, values.float()) for name, values in stats.items()}
