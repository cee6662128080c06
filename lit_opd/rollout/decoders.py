"""Run the body of any Hugging Face model token by token, over the model's own cache.

`LocalEngine` samples with a `Decoder`. This one serves every architecture, `FusedDecoder` the Llama-like ones faster.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lit_opd.errors import UserError
from lit_opd.functional.precision import upcast
from lit_opd.models import LanguageModel
from lit_opd.models.forward import distance
from lit_opd.types import PromptBatch, Prompts

__all__ = ["CacheDecoder", "Decoder", "check_cache", "probe"]

_ATTENTION_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


class Decoder(Protocol):
    """The body of a model, run for one token a row at a time."""

    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """Read the prompts.

        Args:
            batch: prompts.
            num_completions: rows that continue each prompt.
            length: the most tokens that will be written.

        Returns:
            [B, H] hidden states that predict the first token of each row.
        """
        ...

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to every row and return the hidden states [B, H] that predict the next."""
        ...

    def keep(self, index: Tensor) -> bool:
        """Keep only the chosen rows, in that order, or change nothing and return False where rows cannot leave."""
        ...


class CacheDecoder:
    """A decoder for any model that Hugging Face generates with, over the cache that the model makes for itself.

    Raises:
        UserError: the model takes no cache, or gives none back.
    """

    def __init__(self, policy: LanguageModel) -> None:
        if policy.cache_name is None:
            raise _refusal(policy, "takes no cache")
        self.policy, self._cache_name = policy, policy.cache_name
        self._cache: Any = None

    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """See `Decoder.prefill`."""
        (ids_BP, self._seen_BL), self._cache = batch.prompts, None
        hidden_BH = self._read(ids_BP)
        if num_completions == 1:
            return hidden_BH
        self._seen_BL = self._seen_BL.repeat_interleave(num_completions, dim=0)
        if not self.only_attends:  # a recurrent state cannot be repeated for several rows, so each reads its prompt
            self._cache = None
            return self._read(ids_BP.repeat_interleave(num_completions, dim=0))
        self._cache.batch_repeat_interleave(num_completions)
        return hidden_BH.repeat_interleave(num_completions, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """See `Decoder.step`."""
        self._seen_BL = torch.nn.functional.pad(self._seen_BL, (0, 1), value=True)
        return self._read(ids_B[:, None])

    def keep(self, index: Tensor) -> bool:
        """See `Decoder.keep`. Rows cannot be selected from states of other layers than attention."""
        if not self.only_attends:
            return False
        self._cache.batch_select_indices(index)
        self._seen_BL = self._seen_BL[index]
        return True

    @property
    def only_attends(self) -> bool:
        """True where the cache, once prompts were read, holds nothing but keys and values by position."""
        return {type(layer) for layer in getattr(self._cache, "layers", [None])} <= _ATTENTION_LAYERS

    def _read(self, ids_BL: Tensor) -> Tensor:
        # transformers' bodies without attention multiply new inputs by the mask, which must then hold these alone.
        layers = getattr(self._cache, "layers", [])
        recurs = bool(layers) and not any(isinstance(layer, DynamicLayer) for layer in layers)
        mask_BL = self._seen_BL[:, -ids_BL.shape[1] :] if recurs else self._seen_BL
        output = self.policy.run_body(ids_BL, mask_BL, self._cache, use_cache=True)
        self._cache = getattr(output, self._cache_name)
        if self._cache is None:
            raise _refusal(self.policy, "gives no cache back")
        return output.last_hidden_state[:, -1]


def probe(policy: LanguageModel) -> tuple[PromptBatch, Tensor]:
    """Make two prompts of different lengths, and the next token [4] of two rows each, to compare decoders on."""
    ids_BP = torch.arange(12, device=policy.device).view(2, 6) % policy.vocabulary
    mask_BP = torch.tensor([[False, False, True, True, True, True], [True] * 6], device=policy.device)
    return PromptBatch(Prompts(ids_BP, mask_BP), rows=[{}, {}], batch=0, places=[0, 1]), ids_BP[0, :4]


def check_cache(policy: LanguageModel) -> None:
    """Compare a few tokens, decoded over the model's own cache, with a plain forward pass of each row.

    A cache of keys and values alone is trusted. A recurrent state also reads the padding of its row, unless the model
    masks it.

    Raises:
        UserError: they differ, or there is no cache.
    """
    decoder, (batch, next_B) = CacheDecoder(policy), probe(policy)
    ids_BP, mask_BP = batch.prompts
    with torch.autocast(policy.device.type, enabled=False):
        states = [decoder.prefill(batch, 2, 1)]
        if decoder.only_attends:
            return
        states.append(decoder.step(next_B))
        found_B2H = upcast(torch.stack(states, dim=1))
        for row, found_2H in enumerate(found_B2H):
            row_1L = torch.cat([ids_BP[row // 2][mask_BP[row // 2]], next_B[row : row + 1]])[None]
            own = policy.run_body(row_1L, torch.ones_like(row_1L, dtype=torch.bool))
            own_2H = upcast(own.last_hidden_state[0, -2:])
            off = distance(found_2H, own_2H, exact=states[0].dtype == own_2H.dtype)
            if off is not None:
                raise _refusal(policy, f"is off by {off:.2g} over its cache")


def _refusal(policy: LanguageModel, why: str) -> UserError:
    expected, found = "a model that can be sampled token by token over a cache of its own", type(policy.body).__name__
    remedy = "Name another model, or sample with rollout.engine=vllm."
    return UserError(f"{policy.key}.path", expected, f"{found}, which {why}", remedy)
