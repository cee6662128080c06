"""Make the step of on-policy distillation without Lightning: sample, score, estimate.

Training (`module`), the measurement of gradients and the audit run the same `Distiller`, so that what is measured is
what trains. Loops over processes, backward passes and optimizer steps are their callers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.fast_paths import Verdict
from lit_opd.functional import Groups, token_weights
from lit_opd.models import LanguageModel
from lit_opd.objective import Loss, prove_head, student_loss
from lit_opd.perf import phase
from lit_opd.rollout import RolloutSource, Verifier, check_batch, judge, micro_batches
from lit_opd.teachers import Scorer, Wanted, wanted_by
from lit_opd.types import Need, PromptBatch, Rollout, ScoredRollout

__all__ = ["Distiller"]


@dataclass(frozen=True)
class Distiller:
    """A student, its estimator, and the parts that a step needs.

    Attributes:
        student: the model that learns.
        estimator: turns what both models say into a gradient.
        source: completes prompts.
        scorers: by name; `teacher`, and `reference` where an estimator asks for one.
        head_rows: positions that the student's head projects at once.
        micro_batch_tokens: tokens, with padding, whose activations are kept at once.
        aggregation: `token_mean`, `sequence_mean` or `sequence_sum`.
        masked_ids: tokens whose positions are not counted.
        merged: groups of tokens that the loss counts as one symbol.
        verifier: judges completions; None where nothing does.
        fused_head: kernels differentiate the head, as they may where `prove_head` says so.
    """

    student: LanguageModel
    estimator: BoundEstimator
    source: RolloutSource
    scorers: Mapping[str, Scorer]
    head_rows: int
    micro_batch_tokens: int
    aggregation: str = "token_mean"
    masked_ids: Sequence[int] = ()
    merged: Groups = ()
    verifier: Verifier | None = None
    fused_head: bool = False

    def with_estimator(self, estimator: BoundEstimator) -> Distiller:
        """Make the same distiller with another estimator."""
        return replace(self, estimator=estimator)

    @property
    def whole_prompts(self) -> bool:
        """True where the completions of a prompt must stay together."""
        return Need.GROUPS in self.estimator.needs

    @property
    def asks(self) -> dict[str, Wanted]:
        """The scores that the estimator asks of each scorer."""
        asks = {"teacher": wanted_by(self.estimator)}
        asks |= {"reference": Wanted()} if Need.REFERENCE in self.estimator.needs else {}
        merged = tuple(map(tuple, self.merged))  # which can be compared and be a key, as all of `Wanted`
        return {name: wanted._replace(merged=merged) for name, wanted in asks.items()}

    @phase("rollout")
    def sample(self, batch: PromptBatch) -> Rollout:
        """Complete every prompt, with rewards where the estimator asks for them."""
        check_batch(batch)
        batch = batch._replace(ended=self.scorers["teacher"].ahead(self.asks["teacher"]))
        rollout = self.source.complete(batch)
        rollout = rollout.uncount(torch.isin(rollout.ids_BT, rollout.ids_BT.new_tensor(self.masked_ids)))
        return self.judged(batch, rollout) if Need.REWARDS in self.estimator.needs else rollout

    def judged(self, batch: PromptBatch, rollout: Rollout) -> Rollout:
        """Add the verifier's rewards."""
        assert self.verifier is not None
        return replace(rollout, rewards_B=judge(self.student.tokenizer, batch, rollout, self.verifier))

    @phase("teacher")
    def score(self, rollout: Rollout, rows: Tensor | None = None, progress: float = 0.0) -> list[ScoredRollout]:
        """Cut a rollout into micro-batches and have them scored, before any student activation exists.

        Args:
            rollout: completions.
            rows: those to take; None for all. Without any, one row that does not count stands for them, for other
                processes wait for this one.
            progress: the share of training that is done.
        """
        rows = torch.arange(len(rollout)) if rows is None else rows
        if not len(rows):
            rollout, rows = rollout.uncount(rollout.mask_BT), torch.tensor([0])
        parts = micro_batches(rollout, rows, self.micro_batch_tokens, self.whole_prompts)
        scored = [ScoredRollout(rollout.rows(part), {}, progress, self.merged) for part in parts]
        for micro in scored:
            micro.rollout.count()  # while the host waits anyway: here, not between a forward pass and its backward pass
        for name, wanted in self.asks.items():
            scorer = self.scorers[name]
            with scorer.present():
                found = scorer.score_each([micro.rollout for micro in scored], wanted)
            scored = [
                micro._replace(scores={**micro.scores, name: scores})
                for micro, scores in zip(scored, found, strict=True)
            ]
        return scored

    def weights(self, mask_BT: Tensor, tokens: Tensor, sequences: Tensor) -> Tensor:
        """Weigh every token of a micro-batch, [B, T], by the counts of the whole optimizer step."""
        return token_weights(mask_BT, self.aggregation, tokens, sequences)

    def estimate(self, micro: ScoredRollout, weights_BT: Tensor) -> Loss:
        """Sum the estimator's losses over a micro-batch, to be differentiated."""
        with self.student.present():
            return student_loss(self.student, micro, self.estimator, weights_BT, self.head_rows, self.fused_head)

    def prove_head(self, micro: ScoredRollout, choice: str) -> Verdict:
        """Find out on a scored micro-batch whether kernels may differentiate the head."""
        with self.student.present():
            return prove_head(self.student, micro, self.estimator, self.head_rows, choice)
