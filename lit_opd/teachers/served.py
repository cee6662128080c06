"""Score with a vLLM server, for teachers that do not fit beside the student.

Start the server, on this machine or another:

    vllm serve TEACHER --host 127.0.0.1 --port 8000 --max-logprobs 64

and train with `teacher.kind=served teacher.server=http://127.0.0.1:8000`. The server gets token ids, so that no
template and no tokenizer comes between, and says for each how probable it was (`prompt_logprobs`), with the K most
probable tokens where an estimator compares them. Whole distributions it cannot give. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_opd.config import TeacherConfig
from lit_opd.errors import UserError
from lit_opd.teachers.probe import Meeting, check_canary, check_noise, meet
from lit_opd.teachers.prompt_logprobs import Row, ask_for, read_row
from lit_opd.teachers.replicas import Replicas
from lit_opd.teachers.scorer import SUPPORT, TOKEN, Scorer, Wanted
from lit_opd.types import Ended, PromptBatch, Rollout, Scores

__all__ = ["ServedScorer"]

FEWEST = 64  # tokens: the gap of fewer may be small by chance


class ServedScorer(Scorer):
    """Scores with a model behind one or several addresses, in the precision that it is served in.

    Args:
        config: the section of the teacher.
        tokenizer: the student's, with which the server's is compared.

    Attributes:
        meeting: what was found out about the server; in a resumed run the scores of the probe are those of its start.
        gap: how far student and teacher were apart when the run began, in nats (mean over sampled tokens of the
            absolute log-ratio); None until it is known.

    Raises:
        UserError: no server, or one that is not the teacher that it is taken for.
    """

    name = "teacher"

    def __init__(self, config: TeacherConfig, tokenizer: Any) -> None:
        self.gives = frozenset({TOKEN, SUPPORT} if config.top_k else {TOKEN})
        self.top_k, self.canary_every, self.rollouts = config.top_k, config.canary_every, 0
        self.replicas = Replicas(config)
        self.meeting: Meeting = meet(self.replicas, config, tokenizer)
        context = self.meeting.context
        self.longest = None if context is None else context - 1  # for the server writes one token after a row
        self.gap: float | None = None
        self._begun: dict[tuple[int, ...], Future[Any]] = {}  # by K and the tokens
        self._lock = Lock()

    def ahead(self, wanted: Wanted) -> Ended:
        """Give what asks the server about a completion as soon as it has ended."""
        for answer in self._begun.values():
            answer.cancel()
        self._begun.clear()

        def begin(batch: PromptBatch, prompt: int, ids: list[int]) -> None:
            ids_BP, mask_BP = batch.shown.get(self.name, batch.prompts)
            sequence = [*ids_BP[prompt][mask_BP[prompt]].tolist(), *ids]
            # What it does not take is told by `score`, once it is known to count.
            if self.longest is None or len(sequence) <= self.longest:
                self._begin(sequence, wanted.support)

        return begin

    def score(self, rollout: Rollout, wanted: Wanted) -> Scores:
        """Score the counted tokens of one rollout."""
        return self.score_each([rollout], wanted)[0]

    def score_each(self, rollouts: Sequence[Rollout], wanted: Wanted) -> list[Scores]:
        """Score several micro-batches, whose rows are all under way at once.

        Raises:
            UserError: a row longer than the server takes, no answer, or an answer that makes no sense.
        """
        if self.rollouts % self.canary_every == 0 and self.rollouts:
            check_canary(self.replicas, self.meeting)
        self.rollouts += 1
        parts = [_asked(rollout.seen_by(self.name)) for rollout in rollouts]
        asked = [one for part in parts for one in part]
        self._check_lengths([len(one.ids) for one in asked])
        begun = [self._begin(one.ids, wanted.support) for one in asked]
        try:
            answers = self.replicas.answers(begun)
        finally:
            for one in asked:
                self._begun.pop((wanted.support, *one.ids), None)
        pairs = zip(answers, asked, strict=True)
        rows = iter([read_row(answer, one.ids, one.start, wanted.support) for answer, one in pairs])
        device = rollouts[0].ids_BT.device
        found = [_scores([(next(rows), one.counted) for one in part], wanted.support, device) for part in parts]
        if self.gap is None and (gap := _gap(rollouts, found)) is not None:
            check_noise(self.meeting.noise, gap)
            self.gap = gap
        return found

    def state(self) -> dict[str, Any]:
        """Give by what the server is known again, and the gap when the run began."""
        return {"probe": self.meeting.probe, "logps": self.meeting.logps, "gap": self.gap}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Compare the server with the one that the run began with, now and at every canary.

        Raises:
            UserError: other weights answer.
        """
        if state:
            self.meeting = replace(self.meeting, probe=state["probe"], logps=state["logps"])
            self.gap = state["gap"]
            check_canary(self.replicas, self.meeting)

    def _begin(self, ids: Sequence[int], top: int) -> Future[Any]:
        """Ask about a sequence, unless that has begun."""
        key = (top, *ids)
        with self._lock:  # engines may tell of completions from several threads
            if key not in self._begun:
                self._begun[key] = self.replicas.begin(ask_for(ids, top, self.meeting.model))
            return self._begun[key]

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        longest = max(lengths, default=0)
        if self.longest is not None and longest > self.longest:
            expected = f"prompt and completion to be at most {self.longest} tokens, what the teacher's server takes"
            remedy = "Lower it or data.max_prompt_tokens, or start the server with a larger --max-model-len."
            raise UserError("rollout.max_new_tokens", expected, longest, remedy)


class _Asked(NamedTuple):
    """A row to score: its tokens, the completion's start and its counted positions."""

    ids: list[int]
    start: int
    counted: list[int]


def _asked(rollout: Rollout) -> list[_Asked]:
    """List the rows that count."""
    found = []
    columns = (*rollout.prompts, rollout.ids_BT, rollout.real_BT, rollout.mask_BT)
    for prompt_P, shown_P, ids_T, real_T, counted_T in zip(*columns, strict=True):
        counted = torch.nonzero(counted_T).flatten().tolist()
        if counted:
            prompt = prompt_P[shown_P].tolist()
            # To its end though that may not count: the same sequence that was asked about when it ended.
            found.append(_Asked([*prompt, *ids_T[real_T].tolist()], len(prompt), counted))
    return found


def _gap(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> float | None:
    """Average the absolute log-ratio of the student's tokens, where their law was the student's own distribution."""
    parts = []
    for rollout, found in zip(rollouts, scores, strict=True):
        assert found.logps_N is not None
        log_ratio_N = rollout.sampler_logps_BT[rollout.mask_BT] - found.logps_N
        parts.append(log_ratio_N[rollout.own_mask_BT[rollout.mask_BT]].abs())
    apart_N = torch.cat(parts)
    return float(apart_N.mean()) if rollouts[0].law.is_student and len(apart_N) >= FEWEST else None


def _scores(rows: list[tuple[Row, list[int]]], top: int, device: torch.device) -> Scores:
    """Gather what was said of the counted positions of each row."""

    def gathered(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        values = [getattr(row, name)[t] for row, counted in rows for t in counted]
        return torch.tensor(values, dtype=dtype, device=device).reshape(len(values), *shape)

    logps_N = gathered("logps", torch.float32)
    if not top:
        return Scores(logps_N)
    return Scores(logps_N, gathered("support_ids", torch.long, top), gathered("support_logps", torch.float32, top))
