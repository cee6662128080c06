"""What runs the model's body while it samples: any Hugging Face model over its own cache."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lit_opd.models import LanguageModel
from lit_opd.types import PromptBatch

__all__ = ["CacheDecoder", "Decoder"]

_ATTENTION_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


class Decoder(Protocol):
    """The body of a model, one token a row at a time."""

    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """Read the prompts.

        Args:
            batch: prompts.
            num_completions: rows that continue each prompt; they share its computation.
            length: the most tokens that will be written.

        Returns:
            [B, H] hidden states that predict the first token of each row.
        """
        ...

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to every row; returns the hidden states [B, H] that predict the next."""
        ...

    def keep(self, index: Tensor) -> bool:
        """Go on with the chosen rows only, in that order; False, and nothing changed, where rows cannot leave."""
        ...


class CacheDecoder:
    """Any model that Hugging Face generates with, over the cache that the model makes for itself.

    Args:
        policy: the model.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.policy = policy
        self._cache: Any = None

    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """See `Decoder.prefill`."""
        output = self.policy.run_body(*batch.prompts, use_cache=True)
        hidden_BH, self._cache = output.last_hidden_state[:, -1], output.past_key_values
        self._seen_BL = batch.prompts.mask_BP.repeat_interleave(num_completions, dim=0)
        if num_completions == 1:
            return hidden_BH
        self._cache.batch_repeat_interleave(num_completions)
        return hidden_BH.repeat_interleave(num_completions, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """See `Decoder.step`."""
        self._seen_BL = torch.nn.functional.pad(self._seen_BL, (0, 1), value=True)
        output = self.policy.run_body(ids_B[:, None], self._seen_BL, self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.last_hidden_state[:, -1]

    def keep(self, index: Tensor) -> bool:
        """See `Decoder.keep`. States of other layers than attention cannot be chosen from."""
        if not {type(layer) for layer in getattr(self._cache, "layers", [None])} <= _ATTENTION_LAYERS:
            return False
        self._cache.batch_select_indices(index)
        self._seen_BL = self._seen_BL[index]
        return True
