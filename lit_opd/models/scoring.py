"""What the teacher says of a rollout, and what an estimator sees of a chunk of positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.functional import Head, chunks, head_logits, log_softmax, reverse_kl
from lit_opd.models.language_model import LanguageModel
from lit_opd.types import Rollout, TeacherScores, TokenBatch

__all__ = ["CountedPositions", "needs_of", "score_teacher", "support_size_of"]


def needs_of(estimator: BoundEstimator) -> set[str]:
    """What the terms of an estimator ask for together: some of `token`, `support`, `full`, `kl`, `rewards`."""
    return {need for _, term in estimator.terms for need in term.spec.needs.split("+")}


def support_size_of(estimator: BoundEstimator) -> int:
    """The largest K among the terms that compare a support; 0 where none does."""
    return max((t.support_size for _, t in estimator.terms if t.spec.needs.startswith("support")), default=0)


@torch.no_grad()
def score_teacher(teacher: LanguageModel, rollout: Rollout, estimator: BoundEstimator, rows: int) -> TeacherScores:
    """Score the counted tokens of a rollout: only what the estimator needs.

    Args:
        teacher: the frozen model.
        rollout: completions and their mask.
        estimator: decides between log-probabilities of the tokens, those of a support too, or hidden states.
        rows: positions a chunk of the head.

    Returns:
        Scores of the N counted tokens in row-major order, log-probabilities in fp32 nats.
    """
    hidden_NH = teacher.completion_hidden(rollout)[rollout.mask_BT]
    if needs_of(estimator) & {"full", "kl"}:
        return TeacherScores(hidden_NH=hidden_NH)
    ids_N, size = rollout.completion_ids_BT[rollout.mask_BT], support_size_of(estimator)
    pieces = []
    with teacher.precision():  # for the head: the body sees to itself
        # One empty chunk where nothing is counted, so that there is something to concatenate.
        for part in list(chunks(len(hidden_NH), rows)) or [slice(0, 0)]:
            logps_cV = log_softmax(head_logits(hidden_NH[part], teacher.head))
            pieces.append((logps_cV.gather(-1, ids_N[part, None]).squeeze(-1), *logps_cV.topk(size, dim=-1)))
    logps_N, support_logps_NK, support_ids_NK = map(torch.cat, zip(*pieces, strict=True))
    return TeacherScores(logps_N, support_ids_NK, support_logps_NK) if size else TeacherScores(logps_N)


@dataclass(frozen=True)
class CountedPositions:
    """The N counted positions of a micro-batch, flattened: everything but the student's logits.

    Attributes:
        ids_N: the sampled tokens.
        sampler_logps_N: their log-probabilities under the law that sampled them.
        scores: the teacher's scores.
        teacher_head: rebuilds the teacher's logits where the scores are hidden states.
        needs: what the estimator asks for.
        support_size: K, where it asks for a support.
    """

    ids_N: Tensor
    sampler_logps_N: Tensor
    scores: TeacherScores
    teacher_head: Head
    needs: set[str]
    support_size: int = 0

    def tokens(self, student_logits_cV: Tensor, part: slice) -> TokenBatch:
        """What per-position estimators see of a chunk.

        Args:
            student_logits_cV: [c, V] fp32, with grad.
            part: the slice of positions the chunk covers.

        Returns:
            A batch of leading shape [c] with the fields the estimator needs.
        """
        student_logps_cV = torch.log_softmax(student_logits_cV, dim=-1)
        taken_c1 = self.ids_N[part, None]
        batch = TokenBatch(
            student_logps_BT=student_logps_cV.gather(-1, taken_c1).squeeze(-1),
            teacher_logps_BT=student_logps_cV.new_zeros(len(taken_c1)),
            sampler_logps_BT=self.sampler_logps_N[part],
            mask_BT=torch.ones_like(taken_c1[:, 0], dtype=torch.bool),
        )
        if self.scores.hidden_NH is not None:
            teacher_logps_cV = log_softmax(head_logits(self.scores.hidden_NH[part], self.teacher_head))
            return self._from_distributions(batch, student_logps_cV, teacher_logps_cV, taken_c1)
        assert self.scores.logps_N is not None
        batch = replace(batch, teacher_logps_BT=self.scores.logps_N[part])
        if self.scores.support_ids_NK is None or self.scores.support_logps_NK is None:
            return batch
        return _with_support(
            batch, student_logps_cV, self.scores.support_ids_NK[part], self.scores.support_logps_NK[part]
        )

    def _from_distributions(
        self, batch: TokenBatch, student_logps_cV: Tensor, teacher_logps_cV: Tensor, taken_c1: Tensor
    ) -> TokenBatch:
        batch = replace(batch, teacher_logps_BT=teacher_logps_cV.gather(-1, taken_c1).squeeze(-1))
        if "full" in self.needs:
            batch = replace(batch, student_full_logps_BTV=student_logps_cV, teacher_full_logps_BTV=teacher_logps_cV)
        if "kl" in self.needs:
            batch = replace(batch, kl_BT=reverse_kl(student_logps_cV.detach(), teacher_logps_cV))
        if "support" in self.needs:
            logps_cK, ids_cK = teacher_logps_cV.topk(self.support_size, dim=-1)
            batch = _with_support(batch, student_logps_cV, ids_cK, logps_cK)
        return batch


def _with_support(batch: TokenBatch, student_logps_cV: Tensor, ids_cK: Tensor, teacher_logps_cK: Tensor) -> TokenBatch:
    return replace(
        batch,
        support_ids_BTK=ids_cK,
        student_support_logps_BTK=student_logps_cV.gather(-1, ids_cK),
        teacher_support_logps_BTK=teacher_logps_cK,
    )
