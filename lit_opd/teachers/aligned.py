"""Score with a teacher that has another tokenizer, by the spans of text that both tokenizers delimit.

Where the teacher's log-probability of a span goes: to the token of the student that decides the span, which may be
later than its last. A return from any token on then leaves out what was settled before it and nothing else, so that the
undiscounted score-function estimators are exact for the reverse KL of whole completions. Charged at its own tokens, a
span would cost the token that decided it nothing, and single spans would cost something where both models write texts
alike. All estimators but those of whole completions are therefore refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.teachers.scorer import TOKEN, Scorer, Wanted
from lit_opd.teachers.spans import Aligned, TextSpans
from lit_opd.types import Author, FinishReason, Prompts, Rollout, Scores

__all__ = ["AlignedScorer", "check_share", "check_spans"]


@dataclass
class AlignedScorer(Scorer):
    """Scores the student's completions in the tokens of a teacher with another tokenizer.

    Attributes:
        text: the two tokenizers.
        least: the smallest share of exactly aligned tokens that a run accepts.
        inner: scores the teacher's own tokens; None for a model of this process that is not loaded yet.
        context: the longest sequence that the teacher takes, where it is known.
        name: its role.
    """

    text: TextSpans
    least: float
    inner: Scorer | None = None
    context: int | None = None
    name: str = "teacher"

    gives = frozenset({TOKEN})

    def reading(self, inner: Scorer, context: int | None) -> AlignedScorer:
        """Make the same scorer with a model that was loaded."""
        return replace(self, inner=inner, context=context)

    def untempered(self) -> AlignedScorer:
        """Make the same scorer at temperature 1, which evaluations compare with."""
        return replace(self, inner=self._scorer.untempered())

    def present(self) -> AbstractContextManager[None]:
        """Hold what the teacher needs in place for several calls."""
        return self._scorer.present()

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of what scores the teacher's own tokens."""
        return {} if self.inner is None else self.inner.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as that scorer."""
        if self.inner is not None:
            self.inner.load_state(state)

    def score(self, rollout: Rollout, wanted: Wanted) -> Scores:
        """Score the counted tokens of one rollout."""
        return self.score_each([rollout], wanted)[0]

    def score_each(self, rollouts: Sequence[Rollout], wanted: Wanted) -> list[Scores]:
        """Score several micro-batches, span by span. A span counts where all of its tokens do.

        A token has the log-probabilities of the spans that it decides, or 0. One in no span that counts has the
        sampler's, so that it costs nothing.

        Raises:
            UserError: a row longer than the teacher's context, or prompts that are not in the teacher's tokens.
        """
        aligned = [self._align(rollout) for rollout in rollouts]
        pairs = list(zip(rollouts, aligned, strict=True))
        found = self._scorer.score_each([self._written(*pair) for pair in pairs], Wanted())
        return [_by_tokens(*pair, scores) for pair, scores in zip(pairs, found, strict=True)]

    def check_update(self, totals: Mapping[str, float], step: int) -> None:
        """Hold the first rollout of a run to the share of exactly aligned tokens that it accepts.

        Raises:
            UserError: it has fewer.
        """
        if step == 0 and totals["own"]:
            check_share(totals["aligned"] / totals["own"], self.least, "the first rollout", self.name)

    @property
    def _scorer(self) -> Scorer:
        assert self.inner is not None
        return self.inner

    def _align(self, rollout: Rollout) -> list[Aligned]:
        """Align every row, with -1 for spans that do not count, of which a token is not counted."""
        values = (rollout.ids_BT.tolist(), rollout.mask_BT.tolist(), rollout.real_BT.sum(1).tolist())
        rows = []
        for ids, mask, length, finish in zip(*values, rollout.finish_B.tolist(), strict=True):
            row = self.text.align(ids[:length], finish == FinishReason.STOP)
            out = {-1} | {number for number, counts in zip(row.spans, mask[:length], strict=True) if not counts}
            spans, others = ([-1 if n in out else n for n in numbers] for numbers in (row.spans, row.teacher_spans))
            rows.append(row._replace(spans=spans, teacher_spans=others))
        return rows

    def _written(self, rollout: Rollout, rows: Sequence[Aligned]) -> Rollout:
        """Write a rollout in the teacher's tokens, of which those in a span that counts are to be scored."""
        if self.name not in rollout.shown:
            remedy = f"Give the trainer a PromptDataModule, or add the prompts to `shown` as {self.name!r}."
            raise UserError("data", "prompts in the tokens of the teacher", "the student's alone", remedy)
        prompts, device = rollout.shown[self.name], rollout.ids_BT.device
        width = max([1, *(len(row.ids) for row in rows)])
        longest = width + int(prompts.mask_BP.sum(1).amax())
        if self.context is not None and longest > self.context:
            expected = f"prompt and completion to be at most {self.context} of the teacher's tokens, its context"
            raise UserError("rollout.max_new_tokens", expected, longest, "Lower it or data.max_prompt_tokens.")

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], device=device)

        ids_BT = padded([row.ids for row in rows], 0)
        lengths_B1 = torch.tensor([[max(1, len(row.ids))] for row in rows], device=device)
        return replace(
            rollout, ids_BT=ids_BT, real_BT=torch.arange(width, device=device) < lengths_B1,
            mask_BT=padded([row.teacher_spans for row in rows], -1) >= 0,
            author_BT=torch.full_like(ids_BT, Author.TEACHER, dtype=torch.int8), shown={},
            sampler_logps_BT=torch.zeros(ids_BT.shape, device=device),
            # What pads the prompts is a token of the student, which the teacher may not have.
            prompts=Prompts(prompts.ids_BP.masked_fill(~prompts.mask_BP, 0), prompts.mask_BP),
        )  # fmt: skip


def _by_tokens(rollout: Rollout, rows: Sequence[Aligned], scores: Scores) -> Scores:
    """Give the teacher's log-probabilities to the tokens of the student that decide them."""
    assert scores.logps_N is not None
    device, charged = scores.logps_N.device, list[int]()
    lost, exact = list[bool](), list[bool]()
    for row, mask in zip(rows, rollout.mask_BT.tolist(), strict=True):
        counted = [index for index, counts in enumerate(mask) if counts]
        for number in row.teacher_spans:
            if number >= 0:  # at the first counted token that is not before the one that decides
                later = bisect_left(counted, row.decided[number])
                charged.append(len(lost) + min(later, len(counted) - 1))
        row_exact = row.exact
        lost.extend([row.spans[index] < 0 for index in counted])
        exact.extend([row_exact[index] for index in counted])
    sampler_N = rollout.sampler_logps_BT[rollout.mask_BT].to(scores.logps_N.dtype)
    lost_N = torch.tensor(lost, dtype=torch.bool, device=device)
    charged_M = torch.tensor(charged, dtype=torch.long, device=device)
    logps_N = torch.where(lost_N, sampler_N, 0.0).index_add(0, charged_M, scores.logps_N)
    return Scores(logps_N, aligned_N=torch.tensor(exact, dtype=torch.bool, device=device))


def check_spans(estimator: BoundEstimator) -> None:
    """Refuse estimators that do not sum costs over all later tokens.

    Raises:
        UserError: a term that is not unbiased for the reverse KL of whole completions.
    """
    for term in estimator.terms:
        contract = term.estimator.contract
        if term.weighting is not None or not contract.unbiased or contract.target != "sequence_reverse_kl":
            expected = "an unbiased estimator of the reverse KL of whole completions, for a teacher with another "
            expected += "tokenizer, whose tokens later ones of the student decide"
            raise UserError("estimator.name", expected, f"{term.estimator.spec.name!r}", "Set estimator.name=sequence.")


def check_share(share: float, least: float, where: str, key: str = "teacher") -> None:
    """Refuse a teacher whose tokens are too seldom the student's.

    Raises:
        UserError: naming the share that was found.
    """
    if share < least:
        expected = f"at least {least:g} of the student's tokens to be one of the teacher's ({key}.least_aligned)"
        remedy = f"Choose a teacher with a closer tokenizer, or set {key}.least_aligned below that."
        raise UserError(f"{key}.least_aligned", expected, f"{share:.3g} in {where}", remedy)
