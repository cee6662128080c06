"""Give completions their rewards, by a verifier that reads their texts.

`Distiller` asks for the rewards of training, evaluations for those that they report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_opd.data.guarded import Guarded, Verifier
from lit_opd.types import PromptBatch, Rollout

__all__ = ["Verifier", "completion_texts", "failed", "judge"]


def judge(tokenizer: Any, batch: PromptBatch, rollout: Rollout, verifier: Verifier) -> Tensor:
    """Ask a verifier for the reward of every completion, [B] in fp32.

    The verifier maps a completion's text, without special tokens, and its prompt's row to a reward.
    """
    rows = [batch.rows[i] for i in rollout.prompt_index_B.tolist()]
    texts = completion_texts(tokenizer, rollout)
    rewards = [float(verifier(text, row)) for text, row in zip(texts, rows, strict=True)]
    return torch.tensor(rewards, dtype=torch.float32, device=rollout.mask_BT.device)


def failed(verifier: Verifier | None, rollout: Rollout) -> Tensor | None:
    """Take which of the rewards just given [B] stand for errors of the verifier, or None where errors end the run."""
    flags = verifier.failures() if isinstance(verifier, Guarded) else []
    last = flags[-len(rollout) :]  # an interrupted step may have left others
    return torch.tensor(last, device=rollout.mask_BT.device) if len(last) == len(rollout) else None


def completion_texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    """Decode completions, without special tokens."""
    rows = zip(rollout.ids_BT, rollout.real_BT, strict=True)
    return tokenizer.batch_decode([ids[real].tolist() for ids, real in rows], skip_special_tokens=True)
