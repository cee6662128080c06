"""Give completions their rewards, by a verifier that reads their texts.

`Distiller` asks for the rewards of training, evaluations for those that they report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_opd.types import PromptBatch, Rollout

__all__ = ["Verifier", "completion_texts", "judge"]

Verifier = Callable[[str, Mapping[str, Any]], float]


def judge(tokenizer: Any, batch: PromptBatch, rollout: Rollout, verifier: Verifier) -> Tensor:
    """Ask a verifier for the reward of every completion, [B] in fp32.

    The verifier maps a completion's text, without special tokens, and its prompt's row to a reward.
    """
    rows = [batch.rows[i] for i in rollout.prompt_index_B.tolist()]
    texts = completion_texts(tokenizer, rollout)
    rewards = [float(verifier(text, row)) for text, row in zip(texts, rows, strict=True)]
    return torch.tensor(rewards, dtype=torch.float32, device=rollout.mask_BT.device)


def completion_texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    """Decode completions, without special tokens."""
    rows = zip(rollout.ids_BT, rollout.real_BT, strict=True)
    return tokenizer.batch_decode([ids[real].tolist() for ids, real in rows], skip_special_tokens=True)
