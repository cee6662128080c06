"""Write completions down one by one: what was read and written, the reward, and how probable both models find it.

Evaluations keep them, and a run writes those of its last evaluation to `completions.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lit_opd.rollout.judging import completion_texts
from lit_opd.types import FinishReason, PromptBatch, Rollout

__all__ = ["Transcript", "as_jsonl", "transcribe"]


@dataclass(frozen=True)
class Transcript:
    """A completion and what was measured of it.

    Attributes:
        number: of its prompt among the held-out ones.
        prompt: as the student reads it, with its special tokens.
        completion: as the verifier reads it, without them.
        reward: None where nothing judges.
        tokens: its length.
        truncated: it was cut at the longest that is allowed.
        student_logp, teacher_logp: log-probability of the whole completion, in nats.
        reverse_kl: mean over its tokens, in nats; None where the teacher gives no whole distributions.
    """

    number: int
    prompt: str
    completion: str
    reward: float | None
    tokens: int
    truncated: bool
    student_logp: float
    teacher_logp: float
    reverse_kl: float | None


def transcribe(
    tokenizer: Any, batch: PromptBatch, rollout: Rollout, values: Mapping[str, Tensor], rewards_B: Tensor | None
) -> list[Transcript]:
    """Write down every completion of a batch, with the per-token values [B, T] that were measured of it."""
    read, kept = rollout.prompts.ids_BP.cpu(), rollout.prompts.mask_BP.cpu()  # at once, not a wait a row
    prompts = tokenizer.batch_decode([ids[mask].tolist() for ids, mask in zip(read, kept, strict=True)])
    counts_B = rollout.mask_BT.sum(1).clamp(min=1)
    teacher_B = -values["teacher_nll"].sum(1)
    columns: list[Any] = [
        [batch.places[index] for index in rollout.prompt_index_B.tolist()],
        prompts,
        completion_texts(tokenizer, rollout),
        [None] * len(rollout) if rewards_B is None else rewards_B.tolist(),
        rollout.real_BT.sum(1).tolist(),
        (rollout.finish_B == FinishReason.LENGTH).tolist(),
        (teacher_B + values["log_ratio"].sum(1)).tolist(),
        teacher_B.tolist(),
        (values["reverse_kl"].sum(1) / counts_B).tolist() if "reverse_kl" in values else [None] * len(rollout),
    ]
    return [Transcript(*row) for row in zip(*columns, strict=True)]


def as_jsonl(transcripts: Iterable[Transcript]) -> str:
    """Write a line of JSON for each, in the order of their prompts."""
    ordered = sorted(transcripts, key=lambda one: one.number)
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in ordered)
