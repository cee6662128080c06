"""What estimators see of a chunk of positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.estimators.needs import Seen, fill, fillings, needs_of
from lit_opd.functional import Head, log_softmax
from lit_opd.functional.head import SlicedLogits
from lit_opd.types import Need, TeacherScores, TokenBatch

__all__ = ["Chunk", "CountedPositions"]


@dataclass(frozen=True)
class CountedPositions:
    """The N counted positions of a micro-batch, flattened: everything but the student's logits.

    Attributes:
        ids_N: the sampled tokens.
        sampler_logps_N: their log-probabilities under the law that sampled them.
        scores: the teacher's scores.
        teacher_head: rebuilds the teacher's logits where the scores are hidden states.
        progress: the share of training that is done.
        student_wrote_N: False at tokens of demonstrations; None where there are none.
        rows: positions that the teacher's head projects at once.
    """

    ids_N: Tensor
    sampler_logps_N: Tensor
    scores: TeacherScores
    teacher_head: Head
    progress: float = 0.0
    student_wrote_N: Tensor | None = None
    rows: int = 64

    @cached_property
    def _teacher_logits(self) -> SlicedLogits | None:
        hidden_NH = self.scores.hidden_NH
        return None if hidden_NH is None else SlicedLogits(hidden_NH, self.teacher_head, self.rows)

    def chunk(self, student_logits_cV: Tensor, part: slice) -> Chunk:
        """Student and teacher at the positions `part`.

        Args:
            student_logits_cV: [c, V] fp32, with grad.
            part: the slice of positions the chunk covers.
        """
        student_cV, ids_c = torch.log_softmax(student_logits_cV, dim=-1), self.ids_N[part]
        teacher_cV = None if self._teacher_logits is None else log_softmax(self._teacher_logits[part])
        return Chunk(self._sampled(student_cV, teacher_cV, ids_c, part), student_cV, teacher_cV, self.scores, part)

    def _sampled(self, student_cV: Tensor, teacher_cV: Tensor | None, ids_c: Tensor, part: slice) -> TokenBatch:
        known_N = self.scores.logps_N
        teacher_c = _at(teacher_cV, ids_c) if known_N is None else known_N[part]
        return TokenBatch(
            student_logps_BT=_at(student_cV, ids_c),
            teacher_logps_BT=teacher_c,
            sampler_logps_BT=self.sampler_logps_N[part],
            mask_BT=torch.ones_like(ids_c, dtype=torch.bool),
            completion_ids_BT=ids_c,
            student_wrote_BT=None if self.student_wrote_N is None else self.student_wrote_N[part],
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
    scores: TeacherScores
    part: slice

    def tokens(self, estimator: BoundEstimator) -> TokenBatch:
        """The fields an estimator asks for; the others stay None.

        One that is right only on the student's own tokens finds the models equal at those of demonstrations: its loss
        there, which counts zero times, is finite however improbable they are to the student.
        """
        seen = replace(self._seen(), k=estimator.support_size, support=estimator.support)
        batch = fill(self.sampled, estimator.spec.needs, seen)
        if batch.student_wrote_BT is not None and estimator.spec.on_policy:
            seen_c = torch.where(batch.student_wrote_BT, batch.student_logps_BT, batch.teacher_logps_BT)
            batch = replace(batch, student_logps_BT=seen_c)
        return batch

    def summaries(self, needs: Iterable[Need]) -> dict[str, Tensor]:
        """Numbers that sum up the two distributions, detached: the KL and the entropies, where asked for."""
        return fillings(needs_of(needs, "position") - {Need.REFERENCE}, self._seen())

    def _seen(self) -> Seen:
        ids_NK, logps_NK, reference_N = (
            self.scores.support_ids_NK,
            self.scores.support_logps_NK,
            self.scores.reference_logps_N,
        )
        scored = None if ids_NK is None or logps_NK is None else (ids_NK[self.part], logps_NK[self.part])
        reference_c = None if reference_N is None else reference_N[self.part]
        return Seen(self.student_cV, self.teacher_cV, scored, reference_logps=reference_c)


def _at(logps_cV: Tensor | None, ids_c: Tensor) -> Tensor:
    assert logps_cV is not None
    return logps_cV.gather(-1, ids_c[:, None]).squeeze(-1)
