"""What estimators see of a chunk of positions."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.functional import entropy, reverse_kl
from lit_opd.functional.topk import choose_support
from lit_opd.types import ScoredRollout, Scores, TokenBatch

__all__ = ["Chunk", "CountedPositions"]


@dataclass(frozen=True)
class CountedPositions:
    """The N counted positions of a micro-batch, flattened: everything but the student's logits.

    Attributes:
        ids_N: the sampled tokens.
        sampler_logps_N: their log-probabilities under the law that sampled them.
        teacher: its scores.
        reference_logps_N: log-probabilities of the sampled tokens under a reference model, where one was asked.
        progress: the share of training that is done.
        student_wrote_N: False at tokens of demonstrations; None where there are none.
    """

    ids_N: Tensor
    sampler_logps_N: Tensor
    teacher: Scores
    reference_logps_N: Tensor | None = None
    progress: float = 0.0
    student_wrote_N: Tensor | None = None

    @classmethod
    def of(cls, micro: ScoredRollout) -> CountedPositions:
        """Flatten the counted positions of a micro-batch."""
        rollout, mask_BT = micro.rollout, micro.rollout.mask_BT
        wrote_N = rollout.student_wrote_BT[mask_BT]
        return cls(
            rollout.ids_BT[mask_BT], rollout.sampler_logps_BT[mask_BT], micro.scores["teacher"],
            reference_logps_N=micro.scores["reference"].logps_N if "reference" in micro.scores else None,
            progress=micro.progress,
            student_wrote_N=None if wrote_N.all() else wrote_N,
        )  # fmt: skip

    def chunk(self, student_logits_cV: Tensor, part: slice) -> Chunk:
        """Student and teacher at the positions `part`.

        Args:
            student_logits_cV: [c, V] fp32, with grad.
            part: the slice of positions the chunk covers.
        """
        student_cV, ids_c = torch.log_softmax(student_logits_cV, dim=-1), self.ids_N[part]
        teacher_cV = None if self.teacher.full is None else self.teacher.full.logps(part)
        return Chunk(self._sampled(student_cV, teacher_cV, ids_c, part), student_cV, teacher_cV, self.teacher, part)

    def _sampled(self, student_cV: Tensor, teacher_cV: Tensor | None, ids_c: Tensor, part: slice) -> TokenBatch:
        known_N, reference_N = self.teacher.logps_N, self.reference_logps_N
        teacher_c = _at(teacher_cV, ids_c) if known_N is None else known_N[part]
        return TokenBatch(
            student_logps_BT=_at(student_cV, ids_c),
            teacher_logps_BT=teacher_c,
            sampler_logps_BT=self.sampler_logps_N[part],
            mask_BT=torch.ones_like(ids_c, dtype=torch.bool),
            completion_ids_BT=ids_c,
            student_wrote_BT=None if self.student_wrote_N is None else self.student_wrote_N[part],
            reference_logps_BT=None if reference_N is None else reference_N[part],
            progress=self.progress,
        )


@dataclass(frozen=True)
class Chunk:
    """The models' distributions at some positions, and what every estimator sees of them.

    Attributes:
        sampled: the fields that concern the sampled tokens alone, leading shape [c].
        student_cV: log-probabilities, with grad.
        teacher_cV: log-probabilities, or None where the teacher was asked for less.
        scores: the teacher's, of all positions.
        part: which of them these are.
    """

    sampled: TokenBatch
    student_cV: Tensor
    teacher_cV: Tensor | None
    scores: Scores
    part: slice

    def tokens(self, estimator: BoundEstimator) -> TokenBatch:
        """The fields an estimator asks for; the others stay None.

        One that is right only on the student's own tokens finds the models equal at those of demonstrations: its loss
        there, which counts zero times, is finite however improbable they are to the student.
        """
        needs = estimator.spec.needs.split("+")
        batch = replace(self.sampled, **self.summaries(needs))
        if batch.student_wrote_BT is not None and estimator.spec.on_policy:
            seen_c = torch.where(batch.student_wrote_BT, batch.student_logps_BT, batch.teacher_logps_BT)
            batch = replace(batch, student_logps_BT=seen_c)
        if "full" in needs:
            batch = replace(batch, student_full_logps_BTV=self.student_cV, teacher_full_logps_BTV=self.teacher_cV)
        return self._with_support(batch, estimator) if "support" in needs else batch

    def summaries(self, needs: Container[str]) -> dict[str, Any]:
        """Numbers that sum up the two distributions, detached: the KL and the entropies, where asked for."""
        found: dict[str, Any] = {}
        student_cV, teacher_cV = self.student_cV.detach(), self.teacher_cV
        if teacher_cV is not None and "kl" in needs:
            found["kl_BT"] = reverse_kl(student_cV, teacher_cV)
        if teacher_cV is not None and "entropy" in needs:
            found |= {"student_entropy_BT": entropy(student_cV), "teacher_entropy_BT": entropy(teacher_cV)}
        return found

    def _with_support(self, batch: TokenBatch, estimator: BoundEstimator) -> TokenBatch:
        size, scores = estimator.support_size, self.scores
        if self.teacher_cV is not None:
            ids, mask = choose_support(self.student_cV.detach(), self.teacher_cV, size, estimator.support)
            teacher = self.teacher_cV.gather(-1, ids)
        else:  # the teacher's K most probable are the first K of more
            assert scores.support_ids_NK is not None
            assert scores.support_logps_NK is not None
            ids, teacher = (x[self.part, :size] for x in (scores.support_ids_NK, scores.support_logps_NK))
            mask = torch.ones_like(ids, dtype=torch.bool)
        return replace(
            batch, support_ids_BTK=ids, support_mask_BTK=mask, teacher_support_logps_BTK=teacher,
            student_support_logps_BTK=self.student_cV.gather(-1, ids),
        )  # fmt: skip


def _at(logps_cV: Tensor | None, ids_c: Tensor) -> Tensor:
    assert logps_cV is not None
    return logps_cV.gather(-1, ids_c[:, None]).squeeze(-1)
