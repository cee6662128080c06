"""Completions that the student did not write: a share of the prompts is completed by the teacher, or by the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_opd.models import LanguageModel
from lit_opd.types import FinishReason, PromptBatch, Rollout, SamplingLaw

__all__ = ["complete", "join", "student_writes", "take_prompts", "written"]

# Sets the draws apart from those of the tokens: the last number of a seed.
_WHO_WRITES = 2
_PADDED = ("completion_ids_BT", "completion_mask_BT", "mask_BT", "sampler_logps_BT")


def student_writes(seed: int, draws: Sequence[tuple[int, int]], share: float) -> Tensor:
    """Which prompts the student completes itself, [prompts]; named by the draw, whatever stands beside it.

    Args:
        seed: of the run.
        draws: of the prompts, from `PromptBatch.draws`.
        share: the probability of True (lambda of GKD, arXiv:2306.13649).
    """
    numbers = [np.random.default_rng([seed, _WHO_WRITES, *draw]).random() for draw in draws]
    return torch.tensor(numbers, dtype=torch.float64) < share


def complete(
    batch: PromptBatch,
    student_wrote: Tensor,
    sample: Callable[[PromptBatch], Rollout],
    demonstrate: Callable[[PromptBatch], Rollout],
) -> Rollout:
    """Completions of all prompts, some of them demonstrations.

    Args:
        batch: prompts.
        student_wrote: [prompts] which of them the student completes.
        sample: completes prompts as the student.
        demonstrate: completes prompts otherwise.
    """
    if student_wrote.all():
        return sample(batch)
    if not student_wrote.any():
        shown = demonstrate(batch)
        return replace(shown, student_wrote_B=torch.zeros_like(shown.prompt_index_B, dtype=torch.bool))
    own, others = (torch.nonzero(chosen).flatten() for chosen in (student_wrote, ~student_wrote))
    return join(sample(take_prompts(batch, own)), demonstrate(take_prompts(batch, others)), student_wrote)


def take_prompts(batch: PromptBatch, index: Tensor) -> PromptBatch:
    """The chosen prompts of a batch."""
    chosen = index.tolist()
    return PromptBatch(
        batch.prompt_ids_BP[index], batch.prompt_mask_BP[index],
        [batch.rows[i] for i in chosen], [batch.draws[i] for i in chosen],
    )  # fmt: skip


def join(own: Rollout, demonstrated: Rollout, student_wrote: Tensor) -> Rollout:
    """One rollout of two, in the order of the batch they were taken from.

    Args:
        own: completions of the prompts that the student completes.
        demonstrated: completions of the others.
        student_wrote: [prompts] which is which.

    Returns:
        The completions of all prompts, those of one prompt next to each other, under the law of `own`.
    """
    length = max(r.completion_ids_BT.shape[1] for r in (own, demonstrated))
    places = torch.cat([torch.nonzero(student_wrote).flatten(), torch.nonzero(~student_wrote).flatten()])
    index_B = torch.cat([own.prompt_index_B, demonstrated.prompt_index_B + int(student_wrote.sum())])
    places_B = places.to(index_B.device)[index_B]
    order = torch.argsort(places_B, stable=True)
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(own) if isinstance(getattr(own, f.name), Tensor)):
        parts = [getattr(own, name), getattr(demonstrated, name)]
        if name in _PADDED:
            parts = [pad(part, (0, length - part.shape[1])) for part in parts]
        values[name] = torch.cat(parts)[order]
    values["prompt_index_B"] = places_B[order]
    return replace(own, **values, student_wrote_B=student_wrote.to(places_B.device)[places_B[order]])


def written(
    policy: LanguageModel, batch: PromptBatch, texts: Sequence[str], num_completions: int, length: int
) -> Rollout:
    """Given texts as completions, each repeated, ended by the policy's stop token and cut to `length` tokens.

    Nobody sampled them: their `sampler_logps_BT` are 0.
    """
    ids = [
        [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.stop_ids[0]][:length] for text in texts
    ]
    device, width = batch.prompt_ids_BP.device, max(map(len, ids))
    padded = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in ids], device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids], device=device)
    stopped = torch.tensor([row[-1] == policy.stop_ids[0] for row in ids], device=device)
    rows_B = torch.arange(len(ids), device=device).repeat_interleave(num_completions)
    mask_BT = mask[rows_B]
    return Rollout(
        prompt_ids_BP=batch.prompt_ids_BP[rows_B],
        prompt_mask_BP=batch.prompt_mask_BP[rows_B],
        completion_ids_BT=padded[rows_B],
        completion_mask_BT=mask_BT,
        mask_BT=mask_BT,
        sampler_logps_BT=torch.zeros(mask_BT.shape, dtype=torch.float32, device=device),
        finish_B=torch.where(stopped, FinishReason.STOP, FinishReason.LENGTH)[rows_B],
        law=SamplingLaw(),
        prompt_index_B=rows_B,
    )
