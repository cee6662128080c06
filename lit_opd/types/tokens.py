"""Hold the batch of tokens that an estimator sees, and the estimate that it returns.

Made by the objective in training and by the oracle in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

__all__ = ["Estimate", "Need", "TokenBatch"]


class Need(StrEnum):
    """Things an estimator may ask to see. `estimators.needs` says how each of them fills a `TokenBatch`."""

    TOKEN = "token"
    SUPPORT = "support"
    FULL = "full"
    ENTROPY = "entropy"
    KL = "kl"
    REWARDS = "rewards"
    GROUPS = "groups"
    REFERENCE = "reference"


@dataclass(frozen=True)
class TokenBatch:
    """The input of an estimator.

    Student values carry grad, everything else does not. What was not asked for is None.
    Per-position estimators are called on slices of positions, so their leading shape may be [N] instead of [B, T].

    Attributes:
        student_logps_BT: student log-probabilities of the sampled tokens.
        teacher_logps_BT: teacher log-probabilities of the same tokens.
        sampler_logps_BT: log-probabilities under the law that sampled them.
        mask_BT: True at counted tokens.
        completion_ids_BT: the sampled tokens.
        student_wrote_BT: False at tokens of demonstrations; None where the student sampled all.
        support_ids_BTK: the tokens compared at each position.
        support_mask_BTK: True at slots that belong to the support; a union or an intersection leaves some empty.
        student_support_logps_BTK: student log-probabilities of the support, under the full softmax.
        teacher_support_logps_BTK: teacher log-probabilities of the support, under the full softmax.
        student_full_logps_BTV: student log-probabilities of the whole vocabulary.
        teacher_full_logps_BTV: teacher log-probabilities of the whole vocabulary.
        kl_BT: exact reverse KL(student || teacher) at each position, detached: a baseline.
        student_entropy_BT: entropy of the student at each position, detached.
        teacher_entropy_BT: entropy of the teacher at each position.
        rewards_B: outcome reward of each sequence.
        groups_B: completions of one prompt have one number; a batch holds all completions of its prompts.
        reference_logps_BT: log-probabilities of the sampled tokens under a third, reference model.
        progress: the share of training that is done, 0 to 1.
    """

    student_logps_BT: Tensor
    teacher_logps_BT: Tensor
    sampler_logps_BT: Tensor
    mask_BT: Tensor
    completion_ids_BT: Tensor | None = None
    student_wrote_BT: Tensor | None = None
    support_ids_BTK: Tensor | None = None
    support_mask_BTK: Tensor | None = None
    student_support_logps_BTK: Tensor | None = None
    teacher_support_logps_BTK: Tensor | None = None
    student_full_logps_BTV: Tensor | None = None
    teacher_full_logps_BTV: Tensor | None = None
    kl_BT: Tensor | None = None
    student_entropy_BT: Tensor | None = None
    teacher_entropy_BT: Tensor | None = None
    rewards_B: Tensor | None = None
    groups_B: Tensor | None = None
    reference_logps_BT: Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """The output of an estimator, one value a position, never reduced.

    Attributes:
        loss_BT: the surrogate to differentiate, one value a position; its value need not mean anything.
        kl_BT: an estimate of the reverse KL (nats) at each position, detached, to log.
        clipped_BT: True where a limit on a log-ratio, weight or value (a clip, a truncation, a band, a trust region)
            changed this position's term, to log; None where no limit is set.
    """

    loss_BT: Tensor
    kl_BT: Tensor
    clipped_BT: Tensor | None = None

    def weighted(self, factors_BT: Tensor) -> Estimate:
        """Multiply the loss by `factors_BT`, of which a zero leaves no term that a limit could have changed."""
        clipped_BT = None if self.clipped_BT is None else self.clipped_BT & (factors_BT != 0)
        return Estimate(factors_BT * self.loss_BT, self.kl_BT, clipped_BT)
