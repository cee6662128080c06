"""What teacher and reference say of a rollout, before any student activation exists."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.functional import log_softmax, position_losses
from lit_opd.functional.head import Stats
from lit_opd.models.language_model import LanguageModel
from lit_opd.types import Rollout, TeacherScores

__all__ = ["score", "score_reference", "score_teacher", "support_size_of", "wants_distributions"]


def support_size_of(estimator: BoundEstimator) -> int:
    """The largest K among the terms that compare a support; 0 where none does."""
    return max(term.estimator.support_size for term in estimator.terms)


def wants_distributions(estimator: BoundEstimator) -> bool:
    """Whether the teacher's whole distribution is needed, for what depends on the student's too."""
    others = any(t.estimator.support_size and t.estimator.support != "teacher" for t in estimator.terms)
    return others or bool(estimator.needs & {"full", "kl", "entropy"})


def score(
    teacher: LanguageModel, reference: LanguageModel | None, rollout: Rollout, estimator: BoundEstimator, rows: int
) -> TeacherScores:
    """What `score_teacher` and, where there is a reference, `score_reference` say of a rollout."""
    scores = score_teacher(teacher, rollout, estimator, rows)
    return scores if reference is None else replace(scores, reference_logps_N=score_reference(reference, rollout, rows))


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
    with teacher.evaluating():
        hidden_NH = teacher.counted_hidden(rollout)
    if wants_distributions(estimator):
        return TeacherScores(hidden_NH=hidden_NH)
    ids_N, size = rollout.completion_ids_BT[rollout.mask_BT], support_size_of(estimator)

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        logps_cV = log_softmax(logits_cV)
        support_cK = logps_cV.topk(size, dim=-1)
        taken_c = logps_cV.gather(-1, ids_N[part, None]).squeeze(-1)
        return taken_c.new_zeros(()), {"taken": taken_c, "ids": support_cK.indices, "logps": support_cK.values}

    with teacher.precision():  # for the head: the body sees to itself
        _, stats = position_losses(hidden_NH, teacher.head, read, rows)
    return TeacherScores(stats["taken"], stats["ids"], stats["logps"]) if size else TeacherScores(stats["taken"])


@torch.no_grad()
def score_reference(reference: LanguageModel, rollout: Rollout, rows: int) -> Tensor:
    """Log-probabilities [N] of the counted tokens under a reference model, fp32 nats; arguments as above."""
    with reference.evaluating():
        hidden_NH = reference.counted_hidden(rollout)
    ids_N = rollout.completion_ids_BT[rollout.mask_BT]

    def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
        taken_c = log_softmax(logits_cV).gather(-1, ids_N[part, None]).squeeze(-1)
        return taken_c.new_zeros(()), {"taken": taken_c}

    with reference.precision():
        return position_losses(hidden_NH, reference.head, read, rows)[1]["taken"]
