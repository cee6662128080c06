"""Score with a vLLM server, for teachers that do not fit beside the student.

Start the server, on this machine or another:

    vllm serve TEACHER --host 127.0.0.1 --port 8000 --max-logprobs 64

and train with `teacher.kind=served teacher.server=http://127.0.0.1:8000`. The server gets token ids, so that no
template and no tokenizer comes between, and says for each how probable it was (`prompt_logprobs`), with the K most
probable tokens where an estimator compares them. Whole distributions it cannot give. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_opd.config import TeacherConfig
from lit_opd.errors import UserError
from lit_opd.teachers.probe import Meeting, check_canary, meet
from lit_opd.teachers.prompt_logprobs import Row, ask_for, read_row
from lit_opd.teachers.replicas import Replicas
from lit_opd.teachers.scorer import SUPPORT, TOKEN, Scorer, Wanted
from lit_opd.types import Rollout, Scores

__all__ = ["ServedScorer"]


class ServedScorer(Scorer):
    """Scores with a model behind one or several addresses, in the precision that it is served in.

    Args:
        config: the section of the teacher.
        tokenizer: the student's, with which the server's is compared.

    Attributes:
        meeting: what was found out about the server.

    Raises:
        UserError: no server, or one that is not the teacher that it is taken for.
    """

    name = "teacher"

    def __init__(self, config: TeacherConfig, tokenizer: Any) -> None:
        self.gives = frozenset({TOKEN, SUPPORT} if config.top_k else {TOKEN})
        self.top_k, self.canary_every, self.rollouts = config.top_k, config.canary_every, 0
        self.replicas = Replicas(config)
        self.meeting: Meeting = meet(self.replicas, config, tokenizer)

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
        self._check_lengths([one.ids for one in asked])
        answers = self.replicas.ask_all([ask_for(one.ids, wanted.support, self.meeting.model) for one in asked])
        pairs = zip(answers, asked, strict=True)
        rows = iter([read_row(answer, one.ids, one.start, wanted.support) for answer, one in pairs])
        device = rollouts[0].ids_BT.device
        return [_scores([(next(rows), one.counted) for one in part], wanted.support, device) for part in parts]

    def _check_lengths(self, sequences: Sequence[Sequence[int]]) -> None:
        """Check that the server takes every sequence, and the one token that it writes after it."""
        longest, context = max(map(len, sequences), default=0), self.meeting.context
        if context is not None and longest >= context:
            expected = f"prompt and completion to be at most {context - 1} tokens, what the teacher's server takes"
            remedy = "Lower it or data.max_prompt_tokens, or start the server with a larger --max-model-len."
            raise UserError("rollout.max_new_tokens", expected, longest, remedy)


class _Asked(NamedTuple):
    """A row to score, up to its last counted token: its tokens, the completion's start and its counted positions."""

    ids: list[int]
    start: int
    counted: list[int]


def _asked(rollout: Rollout) -> list[_Asked]:
    """List the rows that count."""
    found = []
    for prompt_P, real_P, ids_T, counted_T in zip(*rollout.prompts, rollout.ids_BT, rollout.mask_BT, strict=True):
        counted = torch.nonzero(counted_T).flatten().tolist()
        if counted:
            prompt = prompt_P[real_P].tolist()
            found.append(_Asked([*prompt, *ids_T[: counted[-1] + 1].tolist()], len(prompt), counted))
    return found


def _scores(rows: list[tuple[Row, list[int]]], top: int, device: torch.device) -> Scores:
    """Gather what was said of the counted positions of each row."""

    def gathered(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        values = [getattr(row, name)[t] for row, counted in rows for t in counted]
        return torch.tensor(values, dtype=dtype, device=device).reshape(len(values), *shape)

    logps_N = gathered("logps", torch.float32)
    if not top:
        return Scores(logps_N)
    return Scores(logps_N, gathered("support_ids", torch.long, top), gathered("support_logps", torch.float32, top))
