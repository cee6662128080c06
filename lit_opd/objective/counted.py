"""Fill what estimators see of a chunk of positions.

The head projects a few positions at a time, so no estimator may need more at once. `loss` and `credit` read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.estimators.asking import ask
from lit_opd.estimators.needs import Seen, fill, fillings, needs_of
from lit_opd.functional import Groups, merge_ids, merge_logps
from lit_opd.types import Estimate, Need, ScoredRollout, Scores, TokenBatch

__all__ = ["Chunk", "CountedPositions", "as_policy"]


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
        merged: groups of tokens that count as one symbol, under the first of them.
    """

    ids_N: Tensor
    sampler_logps_N: Tensor
    teacher: Scores
    reference_logps_N: Tensor | None = None
    progress: float = 0.0
    student_wrote_N: Tensor | None = None
    merged: Groups = ()

    @classmethod
    def of(cls, micro: ScoredRollout) -> CountedPositions:
        """Flatten the counted positions of a micro-batch."""
        rollout = micro.rollout
        return cls(
            rollout.counted(rollout.ids_BT), rollout.counted(rollout.sampler_logps_BT), micro.scores["teacher"],
            reference_logps_N=micro.scores["reference"].logps_N if "reference" in micro.scores else None,
            progress=micro.progress,
            student_wrote_N=rollout.counted(rollout.student_wrote_BT) if rollout.has_demonstrations else None,
            merged=micro.merged,
        )  # fmt: skip

    def chunk(self, student_logits_cV: Tensor, part: slice) -> Chunk:
        """Read the student's logits [c, V] (fp32, with grad) and the teacher at the positions `part`."""
        logits_cV = merge_logps(student_logits_cV, self.merged)
        student_cV = torch.log_softmax(logits_cV, dim=-1)
        teacher_cV = None if self.teacher.full is None else merge_logps(self.teacher.full.logps(part), self.merged)
        reference_c = None if self.reference_logps_N is None else self.reference_logps_N[part]
        ids_c, known_N = merge_ids(self.ids_N[part], self.merged), self.teacher.logps_N
        teacher_c = _at(teacher_cV, ids_c) if known_N is None else known_N[part]
        sampled = self.sampled(_at(student_cV, ids_c), teacher_c, ids_c, part)
        if self.merged:
            sampled = self._with_groups_sampled(sampled, student_logits_cV.detach(), logits_cV.detach(), part)
        return Chunk(sampled, student_cV, teacher_cV, self.teacher, part, reference_c)

    def sampled(self, student_c: Tensor, teacher_c: Tensor, ids_c: Tensor, part: slice) -> TokenBatch:
        """Hold what concerns the sampled tokens of the positions `part`, given both models' log-probabilities."""
        return TokenBatch(
            student_logps_BT=student_c,
            teacher_logps_BT=teacher_c,
            sampler_logps_BT=self.sampler_logps_N[part],
            mask_BT=torch.ones_like(ids_c, dtype=torch.bool),
            completion_ids_BT=ids_c,
            student_wrote_BT=None if self.student_wrote_N is None else self.student_wrote_N[part],
            progress=self.progress,
        )

    def _with_groups_sampled(
        self, sampled: TokenBatch, written_cV: Tensor, merged_cV: Tensor, part: slice
    ) -> TokenBatch:
        """Give the sampler the probability of the group, of which it recorded that of one member.

        Which member it draws is taken to be as probable as with the student. A ratio of student to sampler is then the
        ratio at the token that was written, which corrects for the sampler's law without bias.
        """
        assert sampled.completion_ids_BT is not None
        others_c = _at(merged_cV, sampled.completion_ids_BT) - _at(written_cV, self.ids_N[part])
        sampler_c = sampled.sampler_logps_BT
        return replace(sampled, sampler_logps_BT=(sampler_c + others_c).to(sampler_c.dtype))


@dataclass(frozen=True)
class Chunk:
    """The models' distributions at some positions, and what every estimator sees of them.

    Attributes:
        sampled: the fields that concern the sampled tokens alone, leading shape [c].
        student_cV: log-probabilities, with grad.
        teacher_cV: log-probabilities, or None where the teacher was asked for less.
        scores: the teacher's, of all positions.
        part: which of them these are.
        reference_logps_c: of the sampled tokens under a reference model, where one was asked.
    """

    sampled: TokenBatch
    student_cV: Tensor
    teacher_cV: Tensor | None
    scores: Scores
    part: slice
    reference_logps_c: Tensor | None = None

    def tokens(self, estimator: BoundEstimator) -> TokenBatch:
        """Fill the fields that an estimator asks for, and leave the rest None."""
        seen = replace(self._seen(), k=estimator.support_size, support=estimator.support)
        return as_policy(fill(self.sampled, estimator.spec.needs, seen), estimator)

    def estimate(self, estimator: BoundEstimator) -> tuple[TokenBatch, Estimate]:
        """Ask an estimator about these positions, and tell what it saw."""
        tokens = self.tokens(estimator)
        return tokens, ask(estimator, tokens)

    def summaries(self, needs: Iterable[Need]) -> dict[str, Tensor]:
        """Compute what is asked for and has one value a position, detached."""
        return fillings(needs_of(needs, "position"), self._seen())

    def _seen(self) -> Seen:
        ids_NK, logps_NK = self.scores.support_ids_NK, self.scores.support_logps_NK
        scored = None if ids_NK is None or logps_NK is None else (ids_NK[self.part], logps_NK[self.part])
        return Seen(self.student_cV, self.teacher_cV, scored, reference_logps=self.reference_logps_c)


def as_policy(batch: TokenBatch, estimator: BoundEstimator) -> TokenBatch:
    """Show an estimator that is right only on the student's own tokens equal models at those of demonstrations.

    Its loss there, which counts zero times, is then finite however improbable they are to the student.
    """
    if batch.student_wrote_BT is None or not estimator.spec.on_policy:
        return batch
    seen_c = torch.where(batch.student_wrote_BT, batch.student_logps_BT, batch.teacher_logps_BT)
    return replace(batch, student_logps_BT=seen_c)


def _at(logps_cV: Tensor | None, ids_c: Tensor) -> Tensor:
    assert logps_cV is not None
    return logps_cV.gather(-1, ids_c[:, None]).squeeze(-1)
