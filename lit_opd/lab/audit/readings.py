"""Read what two models say at every token of a rollout.

The checks of the audit read `Readings` of the evidence, and call `compare_positions` for numbers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.functional import Groups, entropy, law_logps, log_softmax, merge_ids, merge_logps, position_losses
from lit_opd.functional.head import Stats
from lit_opd.models import LanguageModel
from lit_opd.teachers import LocalScorer, Wanted
from lit_opd.types import Rollout

__all__ = ["Readings", "compare_positions", "read_tokens"]


@dataclass(frozen=True)
class Readings:
    """Numbers [N] of the tokens of a rollout, row by row, on the CPU, with log-probabilities in nats."""

    ids_N: Tensor
    row_N: Tensor  # their completions
    place_N: Tensor  # their places in them, from 0
    counted_N: Tensor  # False at tokens that do not count in training
    sampler_logps_N: Tensor  # of the law that sampled them, recorded by the engine
    law_logps_N: Tensor  # of the same law, computed again from the policy's logits
    student_logps_N: Tensor  # of the policy
    teacher_logps_N: Tensor
    stop_logps_N: Tensor  # the teacher's of any of the policy's stop tokens
    entropy_N: Tensor  # of the teacher
    top_ids_N: Tensor  # the teacher's most probable token
    top_logps_N: Tensor  # its log-probability

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
    """Apply a function to both models' distributions at every counted token.

    Args:
        policy: the one model, in whose precision both heads run.
        teacher: the other, at its temperature.
        rollout: completions.
        rows: positions a chunk of the head.
        compare: maps the policy's logits [c, V], the teacher's log-probabilities [c, V] and the slice of positions they
            belong to, to named values of leading shape [c], which are returned for all N positions.
    """
    distributions = LocalScorer(teacher, rows).score(rollout, Wanted(full=True)).full
    assert distributions is not None

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        return logits_cV.new_zeros(()), compare(logits_cV, distributions.logps(part), part)

    with policy.evaluating(), policy.precision():
        return position_losses(*policy.hidden(rollout), read, rows)[1]


def read_tokens(
    policy: LanguageModel,
    teacher: LanguageModel,
    rollout: Rollout,
    rows: int,
    stop_ids: Sequence[int],
    merged: Groups = (),
) -> Readings:
    """Read both models at every token of every completion, whether it counts or not.

    Arguments are those of `compare_positions`, the tokens that end a completion of the student, and the groups that
    the loss counts as one symbol.
    """
    mask_BT = rollout.real_BT
    written_N1 = rollout.ids_BT[mask_BT][:, None]
    ids_N1 = merge_ids(written_N1, merged)
    stops = merge_ids(ids_N1.new_tensor(stop_ids), merged).unique()

    def compare(logits_cV: Tensor, teacher_cV: Tensor, part: slice) -> Stats:
        def taken(logps_cV: Tensor, ids_N1: Tensor = ids_N1) -> Tensor:
            return logps_cV.gather(-1, ids_N1[part]).squeeze(-1)

        student_cV, teacher_cV = (merge_logps(logps, merged) for logps in (log_softmax(logits_cV), teacher_cV))
        top = teacher_cV.max(-1)
        return {
            "law_logps_N": taken(law_logps(logits_cV, rollout.law), written_N1),
            "student_logps_N": taken(student_cV),
            "teacher_logps_N": taken(teacher_cV),
            "stop_logps_N": teacher_cV.index_select(-1, stops).logsumexp(-1),
            "entropy_N": entropy(teacher_cV),
            "top_ids_N": top.indices,
            "top_logps_N": top.values,
        }

    row_N, place_N = torch.nonzero(mask_BT, as_tuple=True)
    values = {
        "ids_N": written_N1[:, 0],
        "row_N": row_N,
        "place_N": place_N,
        "counted_N": rollout.mask_BT[mask_BT],
        "sampler_logps_N": rollout.sampler_logps_BT[mask_BT],
        **compare_positions(policy, teacher, replace(rollout, mask_BT=mask_BT), rows, compare),
    }
    return Readings(**{name: values_N.cpu() for name, values_N in values.items()})
