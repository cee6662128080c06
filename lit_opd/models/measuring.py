"""Measure the yardsticks, by which runs of all estimators are compared.

They are measured on completions sampled at temperature 1 without truncation, and every divergence is exact over the
vocabulary at each position of these completions. Evaluations call this.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_opd.functional import entropy, forward_kl, jsd, log_softmax, position_losses, reverse_kl, upcast
from lit_opd.functional.head import Stats
from lit_opd.functional.support import choose_support, support_mass
from lit_opd.measures.custom import TokenMeasure, apply_measures
from lit_opd.models.language_model import LanguageModel
from lit_opd.types import Rollout, Scores

__all__ = ["OF_TOKENS", "measure_yardsticks"]

# The yardsticks that a teacher which scores sampled tokens only can give.
OF_TOKENS = ("teacher_nll", "log_ratio", "student_entropy")


@torch.no_grad()
def measure_yardsticks(
    policy: LanguageModel,
    teacher: Scores,
    rollout: Rollout,
    rows: int,
    support_size: int = 16,
    measures: Mapping[str, TokenMeasure] | None = None,
) -> Stats:
    """Compare a policy with the teacher, both at temperature 1, at every token of the policy's own completions.

    Args:
        policy: the model that wrote the completions.
        teacher: the teacher's scores of the counted tokens: whole distributions, or of the sampled tokens only.
        rollout: the completions.
        rows: positions a chunk of the head.
        support_size: K, how many of each model's most probable tokens are compared; at most the vocabulary.
        measures: a user's own yardsticks, functions of both distributions by name.

    Returns:
        Every name of `measures.table.YARDSTICKS` (nats; `top1_agreement` is 0 or 1; `jsd` is the plain Jensen-Shannon
        divergence, at most log 2), and in the same shape, [B, T], zero where not counted:

        - `log_ratio`, `entropy_gap`, `stop_log_ratio`: student minus teacher (nats), of the taken token, of the two
          entropies, and of the log-probabilities of stopping here; the last is NaN where no token stops.
        - `overlap`: the share of the two models' K most probable tokens that they have in common.
        - `student_mass`, `teacher_mass`: each model's probability of the teacher's K most probable tokens.

        Of a teacher that gives no whole distributions, only `teacher_nll`, `log_ratio` and `student_entropy`.
    """
    policy, mask_BT = policy.untempered(), rollout.mask_BT
    taken_N1 = rollout.ids_BT[mask_BT][:, None]
    stop_ids = torch.tensor(policy.stop_ids, dtype=torch.long, device=mask_BT.device)

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        student, taken_c1 = log_softmax(logits_cV), taken_N1[part]
        stats = {"student_entropy": entropy(student)}
        if teacher.full is None:
            assert teacher.logps_N is not None
            teacher_logps = upcast(teacher.logps_N[part])
        else:
            other = teacher.full.logps(part)
            teacher_logps = other.gather(-1, taken_c1).squeeze(-1)
            stats |= _of_distributions(student, other, stop_ids) | _supports(student, other, support_size)
            stats |= apply_measures(measures or {}, student, other, taken_c1.squeeze(-1))
        stats |= {"teacher_nll": -teacher_logps, "log_ratio": student.gather(-1, taken_c1).squeeze(-1) - teacher_logps}
        return logits_cV.new_zeros(()), stats

    # The head runs in the policy's own precision too, or a teacher as policy would differ from itself.
    with policy.evaluating(), policy.precision():
        _, stats = position_losses(*policy.hidden(rollout), read, rows)
    blank_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    return {name: blank_BT.masked_scatter(mask_BT, values.float()) for name, values in stats.items()}


def _of_distributions(student_cV: Tensor, teacher_cV: Tensor, stop_ids: Tensor) -> Stats:
    """Compare two whole distributions."""
    teacher_entropy = entropy(teacher_cV)
    stops = [logps[:, stop_ids].logsumexp(-1) for logps in (student_cV, teacher_cV)]
    return {
        "reverse_kl": reverse_kl(student_cV, teacher_cV),
        "forward_kl": forward_kl(student_cV, teacher_cV),
        "jsd": jsd(student_cV, teacher_cV, teacher_weight=0.5) / 4,
        "top1_agreement": (student_cV.argmax(-1) == teacher_cV.argmax(-1)).float(),
        "teacher_entropy": teacher_entropy,
        "entropy_gap": entropy(student_cV) - teacher_entropy,
        "stop_log_ratio": stops[0] - stops[1],
    }


def _supports(student_cV: Tensor, teacher_cV: Tensor, size: int) -> Stats:
    """Compare the two models' most probable tokens, and each model's probability of the teacher's."""
    k = min(size, student_cV.shape[-1])
    ids_cK, shared_cK = choose_support(student_cV, teacher_cV, k, "intersection")
    return {
        "overlap": shared_cK.to(student_cV.dtype).mean(-1),
        "student_mass": support_mass(student_cV.gather(-1, ids_cK)),
        "teacher_mass": support_mass(teacher_cV.gather(-1, ids_cK)),
    }
