"""The values that flow through one training step, and the shape legend.

Shape legend, used as name suffixes on floors 0 to 3:

    B  sequences (one completion of one prompt each)
    P  prompt positions, padded on the left
    T  completion positions, padded on the right
    K  support size: tokens compared at a position
    V  vocabulary
    N  counted positions, flattened
    H  hidden width

Every log-probability is in nats. In every mask True means counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Estimate", "FinishReason", "Need", "PromptBatch", "Rollout", "SamplingLaw", "ScoredRollout", "TeacherScores",
    "TokenBatch",
]  # fmt: skip


class PromptBatch(NamedTuple):
    """Prompts to complete.

    Attributes:
        prompt_ids_BP: prompt tokens, padded on the left.
        prompt_mask_BP: True at real prompt tokens.
        rows: the data set's row of each prompt (its answer and whatever a verifier wants).
        draws: two integers that name each row's random draws, so that what is sampled for it depends neither on
            its neighbours in the batch nor on the number of processes.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    rows: list[Mapping[str, Any]]
    draws: list[tuple[int, int]]


@dataclass(frozen=True)
class SamplingLaw:
    """The law that turns a model's logits into the distribution tokens are drawn from.

    Logits are divided by `temperature`; then only the `top_k` largest are kept (0: all), then the smallest
    set of largest-first tokens whose mass reaches `top_p` (1: all), then tokens with at least `min_p` times
    the largest probability (0: all); what is left is renormalised. `min_new_tokens` forbids the stop tokens at the
    first that many completion positions.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0

    @property
    def is_student(self) -> bool:
        """True where the sampler is the student's own distribution: temperature 1 and nothing cut off."""
        return self == SamplingLaw()


class FinishReason(IntEnum):
    """Why a completion ended."""

    STOP = 0
    LENGTH = 1


@dataclass(frozen=True)
class Rollout:
    """Completions, and the law that sampled them.

    Attributes:
        prompt_ids_BP: prompt tokens, padded on the left.
        prompt_mask_BP: True at real prompt tokens.
        completion_ids_BT: sampled tokens, padded on the right.
        completion_mask_BT: True at real completion tokens; the stop token is one of them.
        mask_BT: True at counted tokens. Tokens that the student did not write are in the sequence and out of this mask.
        sampler_logps_BT: log-probability of each token *under the law that sampled it* (nats, fp32), 0 elsewhere.
        finish_B: `FinishReason` of each row.
        law: the sampling law.
        prompt_index_B: which prompt of the batch each row completes.
        student_wrote_B: True at rows that the student sampled, False at demonstrations; None where it sampled all.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor
    mask_BT: Tensor
    sampler_logps_BT: Tensor
    finish_B: Tensor
    law: SamplingLaw
    prompt_index_B: Tensor
    student_wrote_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.completion_ids_BT)

    @property
    def own_mask_BT(self) -> Tensor:
        """True at counted tokens that the student sampled."""
        return self.mask_BT if self.student_wrote_B is None else self.mask_BT & self.student_wrote_B[:, None]

    def uncount(self, positions_BT: Tensor) -> Rollout:
        """The same tokens with the chosen positions left out of the count."""
        return replace(self, mask_BT=self.mask_BT & ~positions_BT)

    def rows(self, index: Tensor) -> Rollout:
        """The chosen rows, with padding that no chosen row needs trimmed from both ends."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        first = int(picked["prompt_mask_BP"].sum(1).amax()) if len(index) else 0
        last = int(picked["completion_mask_BT"].sum(1).amax()) if len(index) else 0
        start = picked["prompt_ids_BP"].shape[1] - first
        for name in ("prompt_ids_BP", "prompt_mask_BP"):
            picked[name] = picked[name][:, start:]
        for name in ("completion_ids_BT", "completion_mask_BT", "mask_BT", "sampler_logps_BT"):
            picked[name] = picked[name][:, :last]
        return replace(self, **picked)


@dataclass(frozen=True)
class TeacherScores:
    """What the teacher says about the counted tokens of a rollout: log-probabilities, or hidden states to make them.

    Attributes:
        logps_N: log-probabilities of the sampled tokens.
        support_ids_NK: the teacher's K most probable tokens at each position.
        support_logps_NK: their log-probabilities under the full softmax.
        hidden_NH: last hidden states, from which full-vocabulary log-probabilities are rebuilt a chunk at a time.
        reference_logps_N: log-probabilities of the sampled tokens under the reference model, where one is asked for.
    """

    logps_N: Tensor | None = None
    support_ids_NK: Tensor | None = None
    support_logps_NK: Tensor | None = None
    hidden_NH: Tensor | None = None
    reference_logps_N: Tensor | None = None


class ScoredRollout(NamedTuple):
    """A rollout, or a micro-batch of one, with what the teacher and the verifier say of it.

    Attributes:
        rollout: the completions.
        scores: the teacher's.
        rewards_B: the verifier's, where the estimator wants them.
        progress: the share of training that is done, 0 to 1.
    """

    rollout: Rollout
    scores: TeacherScores
    rewards_B: Tensor | None = None
    progress: float = 0.0


class Need(StrEnum):
    """What an estimator asks to see; `estimators.needs` says how each member fills a `TokenBatch`."""

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
    """What an estimator sees. Student values carry grad, everything else does not; what was not asked for is None.

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
    """What an estimator returns; it never reduces.

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
        """The estimate whose loss is `factors_BT` times this one; a factor of zero leaves no term to be changed."""
        clipped_BT = None if self.clipped_BT is None else self.clipped_BT & (factors_BT != 0)
        return Estimate(factors_BT * self.loss_BT, self.kl_BT, clipped_BT)
