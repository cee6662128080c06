"""What two models say at every token of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.functional import entropy, law_logps, log_softmax, position_losses
from lit_opd.functional.head import Stats
from lit_opd.models import LanguageModel
from lit_opd.teachers import LocalScorer, Wanted
from lit_opd.types import Rollout

__all__ = ["Positions", "compare_positions", "read_positions"]


@dataclass(frozen=True)
class Positions:
    """Numbers [N] of the tokens of a rollout, row by row, on the CPU; log-probabilities in nats.

    Attributes:
        ids_N: the tokens.
        row_N: their completions.
        place_N: their places in them, from 0.
        counted_N: False at tokens that do not count in training.
        sampler_logps_N: of the law that sampled them, as the engine recorded it.
        law_logps_N: the same, made again from the policy's logits.
        student_logps_N: of the policy.
        teacher_logps_N: of the teacher.
        stop_logps_N: the teacher's of any of the policy's stop tokens.
        entropy_N: of the teacher.
        top_ids_N: the teacher's most probable token.
        top_logps_N: its log-probability.
    """

    ids_N: Tensor
    row_N: Tensor
    place_N: Tensor
    counted_N: Tensor
    sampler_logps_N: Tensor
    law_logps_N: Tensor
    student_logps_N: Tensor
    teacher_logps_N: Tensor
    stop_logps_N: Tensor
    entropy_N: Tensor
    top_ids_N: Tensor
    top_logps_N: Tensor

    @property
    def log_ratio_N(self) -> Tensor:
        """Student minus teacher, nats."""
        return self.student_logps_N - self.teacher_logps_N


@torch.no_grad()
def compare_positions(
    policy: LanguageModel,
    teacher: LanguageModel,
    rollout: Rollout,
    rows: int,
    compare: Callable[[Tensor, Tensor, slice], Stats],
) -> Stats:
    """What a function makes of both models' distributions at every counted token.

    Args:
        policy: the one model, in whose precision both heads run.
        teacher: the other, at its temperature.
        rollout: completions.
        rows: positions a chunk of the head.
        compare: maps the policy's logits [c, V], the teacher's log-probabilities [c, V] and the slice of positions they
            belong to, to named values of leading shape [c].

    Returns:
        The values, of leading shape [N].
    """
    scores = LocalScorer(teacher, rows).score(rollout, Wanted(full=True))
    assert scores.full is not None
    distributions = scores.full

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        return logits_cV.new_zeros(()), compare(logits_cV, distributions.logps(part), part)

    with policy.evaluating(), policy.precision():
        return position_losses(*policy.hidden(rollout), read, rows)[1]


def read_positions(
    policy: LanguageModel, teacher: LanguageModel, rollout: Rollout, rows: int, stop_ids: Sequence[int]
) -> Positions:
    """What both models say at every token of every completion, whether it counts or not.

    Args:
        policy: wrote the completions.
        teacher: the frozen model.
        rollout: the completions.
        rows: positions a chunk of the head.
        stop_ids: the tokens that end a completion of the student.
    """
    mask_BT = rollout.real_BT
    whole = replace(rollout, mask_BT=mask_BT)
    ids_N1, stops = (
        rollout.ids_BT[mask_BT][:, None],
        torch.tensor(stop_ids, dtype=torch.long, device=mask_BT.device),
    )

    def compare(logits_cV: Tensor, teacher_cV: Tensor, part: slice) -> Stats:
        top = teacher_cV.max(-1)
        return {
            "law_logps_N": law_logps(logits_cV, rollout.law).gather(-1, ids_N1[part]).squeeze(-1),
            "student_logps_N": log_softmax(logits_cV).gather(-1, ids_N1[part]).squeeze(-1),
            "teacher_logps_N": teacher_cV.gather(-1, ids_N1[part]).squeeze(-1),
            "stop_logps_N": teacher_cV.index_select(-1, stops).logsumexp(-1),
            "entropy_N": entropy(teacher_cV),
            "top_ids_N": top.indices,
            "top_logps_N": top.values,
        }

    stats = compare_positions(policy, teacher, whole, rows, compare)
    row_N, place_N = torch.nonzero(mask_BT, as_tuple=True)
    return Positions(
        ids_N=ids_N1[:, 0].cpu(), row_N=row_N.cpu(), place_N=place_N.cpu(), counted_N=rollout.mask_BT[mask_BT].cpu(),
        sampler_logps_N=rollout.sampler_logps_BT[mask_BT].cpu(),
        **{name: values.cpu() for name, values in stats.items()},
    )  # fmt: skip
