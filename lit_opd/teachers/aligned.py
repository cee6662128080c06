"""Score with a teacher that has another tokenizer, by the spans of text that both tokenizers delimit.

Where the log-ratio of a span goes: log p(span) - log q(span) is one number for all tokens of a span, so that the
objective makes the span one action (`objective.loss`). Estimators that weigh score functions by an unbiased cost, which
is linear in the teacher's log-probability, are then those of a student that writes spans. All others are refused:
the teacher's probabilities of the student's spans do not sum to 1, for it could spell a text in other tokens as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.functional import ends_of_spans, sum_spans
from lit_opd.teachers.combined import is_exact
from lit_opd.teachers.scorer import TOKEN, Scorer, Wanted
from lit_opd.teachers.spans import Aligned, TextSpans
from lit_opd.types import FinishReason, Prompts, Rollout, Scores

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

    def score(self, rollout: Rollout, wanted: Wanted) -> Scores:
        """Score the counted tokens of one rollout."""
        return self.score_each([rollout], wanted)[0]

    def score_each(self, rollouts: Sequence[Rollout], wanted: Wanted) -> list[Scores]:
        """Score several micro-batches, span by span. A span counts where all of its tokens do.

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
        """Align every row, with numbers of spans that no other row has, and -1 for spans that do not count."""
        rows, before = [], 0
        lengths = rollout.real_BT.sum(1).tolist()
        values = (rollout.ids_BT.tolist(), rollout.mask_BT.tolist(), lengths, rollout.finish_B.tolist())
        for ids, mask, length, finish in zip(*values, strict=True):
            row, counted = self.text.align(ids[:length], finish == FinishReason.STOP), mask[:length]
            out = {-1} | {number for number, counts in zip(row.spans, counted, strict=True) if not counts}
            spans, others = (
                [-1 if number in out else number + before for number in numbers]
                for numbers in (row.spans, row.teacher_spans)
            )
            before += 1 + max(row.spans, default=-1)
            rows.append(Aligned(row.ids, spans, others))
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
            author_BT=torch.zeros_like(ids_BT, dtype=torch.int8), shown={},
            sampler_logps_BT=torch.zeros(ids_BT.shape, device=device),
            # What pads the prompts is a token of the student, which the teacher may not have.
            prompts=Prompts(prompts.ids_BP.masked_fill(~prompts.mask_BP, 0), prompts.mask_BP),
        )  # fmt: skip


def _by_tokens(rollout: Rollout, rows: Sequence[Aligned], scores: Scores) -> Scores:
    """Give the teacher's log-probability of each span to the tokens of the student."""
    assert scores.logps_N is not None
    device, mask_BT = scores.logps_N.device, rollout.mask_BT
    counted = [t for real_T, mask_T in zip(rollout.real_BT, mask_BT, strict=True) for t in mask_T[real_T].tolist()]

    def counts(values: list[int] | list[bool]) -> Tensor:
        return torch.tensor([value for value, counts in zip(values, counted, strict=True) if counts], device=device)

    spans_N = counts([number for row in rows for number in row.spans]).long()
    aligned_N = counts([exact for row in rows for exact in row.exact]).bool()
    others_M = torch.tensor([n for row in rows for n in row.teacher_spans if n >= 0], device=device, dtype=torch.long)
    ends_N, teacher_M = ends_of_spans(spans_N), sum_spans(scores.logps_N, others_M)[ends_of_spans(others_M)]
    sampler_N = rollout.sampler_logps_BT[mask_BT].to(teacher_M.dtype)
    rest_N = sampler_N - sum_spans(sampler_N, spans_N)  # at an end: minus what the tokens before it have
    logps_N = torch.where(ends_N, torch.zeros_like(rest_N).masked_scatter(ends_N, teacher_M) + rest_N, sampler_N)
    return Scores(logps_N, spans_N=spans_N, aligned_N=aligned_N)


def check_spans(estimator: BoundEstimator) -> None:
    """Refuse estimators that are not those of a student that writes spans.

    Raises:
        UserError: a term that is not unbiased for the reverse KL.
    """
    for term in estimator.terms:
        if not is_exact(term):
            expected = "an unbiased estimator of the reverse KL for a teacher with another tokenizer, whose spans of "
            expected += "text are actions"
            raise UserError("estimator.name", expected, f"{term.estimator.spec.name!r}", "Set estimator.name=token.")


def check_share(share: float, least: float, where: str, key: str = "teacher") -> None:
    """Refuse a teacher whose tokens are too seldom the student's.

    Raises:
        UserError: naming the share that was found.
    """
    if share < least:
        expected = f"at least {least:g} of the student's tokens to be one of the teacher's ({key}.least_aligned)"
        remedy = f"Choose a teacher with a closer tokenizer, or set {key}.least_aligned below that."
        raise UserError(f"{key}.least_aligned", expected, f"{share:.3g} in {where}", remedy)
