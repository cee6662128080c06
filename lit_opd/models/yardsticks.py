"""The yardsticks: what every run is measured by, whatever its estimator.

Always on completions sampled at temperature 1, untruncated; every divergence is exact over the vocabulary at each
position of these completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional import entropy, forward_kl, jsd, log_softmax, position_losses, reverse_kl
from lit_opd.functional.head import SlicedLogits, Stats
from lit_opd.functional.support import choose_support, support_mass
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
def measure_yardsticks(
    policy: LanguageModel, teacher: LanguageModel, rollout: Rollout, rows: int, support_size: int = 16
) -> Stats:
    """Compare a policy with the teacher, both at temperature 1, at every token of the policy's own completions.

    Args:
        policy: the model that wrote the completions.
        teacher: the frozen model.
        rollout: completions.
        rows: positions a chunk of the head.
        support_size: K, how many of each model's most probable tokens are compared; at most the vocabulary.

    Returns:
        Every name of `YARDSTICKS` (nats; `top1_agreement` is 0 or 1; `jsd` is the plain Jensen-Shannon divergence, at
        most log 2), and in the same shape, [B, T], zero where not counted:

        - `log_ratio`, `entropy_gap`, `stop_log_ratio`: student minus teacher (nats), of the taken token, of the two
          entropies, and of the log-probabilities of stopping here; the last is NaN where no token stops.
        - `overlap`: the share of the two models' K most probable tokens that they have in common.
        - `student_mass`, `teacher_mass`: each model's probability of the teacher's K most probable tokens.
    """
    policy, teacher, mask_BT = policy.untempered(), teacher.untempered(), rollout.mask_BT
    taken_N1 = rollout.completion_ids_BT[mask_BT][:, None]
    stop_ids = torch.tensor(policy.stop_ids, dtype=torch.long, device=mask_BT.device)
    with teacher.evaluating():
        teacher_logits = SlicedLogits(teacher.counted_hidden(rollout), teacher.head, rows)

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        student = log_softmax(logits_cV)
        other = log_softmax(teacher_logits[part])
        teacher_logps = other.gather(-1, taken_N1[part]).squeeze(-1)
        own_entropy, other_entropy = entropy(student), entropy(other)
        stops = [logps[:, stop_ids].logsumexp(-1) for logps in (student, other)]
        stats = {
            "reverse_kl": reverse_kl(student, other),
            "forward_kl": forward_kl(student, other),
            "jsd": jsd(student, other, teacher_weight=0.5) / 4,
            "teacher_nll": -teacher_logps,
            "top1_agreement": (student.argmax(-1) == other.argmax(-1)).float(),
            "student_entropy": own_entropy,
            "teacher_entropy": other_entropy,
            "log_ratio": student.gather(-1, taken_N1[part]).squeeze(-1) - teacher_logps,
            "entropy_gap": own_entropy - other_entropy,
            "stop_log_ratio": stops[0] - stops[1],
            **_supports(student, other, support_size),
        }
        return logits_cV.new_zeros(()), stats

    # The head too in the policy's own precision, or a teacher would differ from itself.
    with policy.evaluating(), policy.precision():
        _, stats = position_losses(policy.counted_hidden(rollout), policy.head, read, rows)
    blank_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    return {name: blank_BT.masked_scatter(mask_BT, values.float()) for name, values in stats.items()}


def _supports(student_cV: Tensor, teacher_cV: Tensor, size: int) -> Stats:
    """How far the two models' most probable tokens are the same, and how much each model gives to the teacher's."""
    k = min(size, student_cV.shape[-1])
    ids_cK, shared_cK = choose_support(student_cV, teacher_cV, k, "intersection")
    return {
        "overlap": shared_cK.to(student_cV.dtype).mean(-1),
        "student_mass": support_mass(student_cV.gather(-1, ids_cK)),
        "teacher_mass": support_mass(teacher_cV.gather(-1, ids_cK)),
    }
