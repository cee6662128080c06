"""Run the body of any Hugging Face model token by token, over the model's own cache.

`LocalEngine` samples with a `Decoder`. This one serves every architecture, `FusedDecoder` the Llama-like ones faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lit_opd.errors import UserError
from lit_opd.functional.precision import upcast
from lit_opd.models import LanguageModel
from lit_opd.models.forward import FAILURES, distance
from lit_opd.types import PromptBatch, Prompts

__all__ = ["CacheDecoder", "Decoder", "probe", "reads_together"]

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


@dataclass
class _Part:
    """Rows that are read together.

    Attributes:
        rows_R: their places in the batch.
        seen_RL: True at real tokens of what was read so far.
        cache: the model's own, of what was read so far.
    """

    rows_R: Tensor
    seen_RL: Tensor
    cache: Any = None

    @property
    def only_attends(self) -> bool:
        """True where the cache holds nothing but keys and values by position."""
        # A class of the model's own, such as MiniMaxCache, keeps recurrent states beside its layers.
        return type(self.cache) is DynamicCache and {type(layer) for layer in self.cache.layers} <= _ATTENTION_LAYERS


class CacheDecoder:
    """A decoder for any model that Hugging Face generates with, over the cache that the model makes for itself.

    Args:
        policy: the model.
        together: read all prompts at once, padded on the left. Otherwise only prompts of one length are read together,
            and no padding enters the model, which recurrent states and positions counted by column would keep.

    Raises:
        UserError: the model takes no cache, or gives none back.
    """

    def __init__(self, policy: LanguageModel, together: bool = True) -> None:
        if policy.cache_name is None:
            raise _refusal(policy, "takes no cache")
        self.policy, self.together, self._cache_name = policy, together, policy.cache_name
        self.parts: list[_Part] = []

    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """See `Decoder.prefill`."""
        lengths_B = batch.prompts.mask_BP.sum(1)
        group_B = torch.zeros_like(lengths_B) if self.together else lengths_B
        groups = [torch.nonzero(group_B == group).flatten() for group in group_B.unique()]
        hidden = [self._prefill(batch.prompts.rows(index), index, num_completions) for index in groups]
        return self._in_order(hidden)

    def _prefill(self, prompts: Prompts, index: Tensor, count: int) -> Tensor:
        rows_R = (index[:, None] * count + torch.arange(count, device=index.device)).flatten()
        part = _Part(rows_R, prompts.mask_BP)
        self.parts = [*self.parts, part]
        hidden_RH = self._read(part, prompts.ids_BP)
        if count == 1:
            return hidden_RH
        part.seen_RL = part.seen_RL.repeat_interleave(count, dim=0)
        if not part.only_attends:  # a recurrent state cannot be repeated for several rows, so each reads its prompt
            part.cache = None
            return self._read(part, prompts.ids_BP.repeat_interleave(count, dim=0))
        part.cache.batch_repeat_interleave(count)
        return hidden_RH.repeat_interleave(count, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """See `Decoder.step`."""
        hidden = []
        for part in self.parts:
            part.seen_RL = torch.nn.functional.pad(part.seen_RL, (0, 1), value=True)
            own_R = ids_B if len(self.parts) == 1 else ids_B[part.rows_R]
            hidden.append(self._read(part, own_R[:, None]))
        return self._in_order(hidden)

    def keep(self, index: Tensor) -> bool:
        """See `Decoder.keep`. Rows cannot be selected from states of other layers than attention."""
        if len(self.parts) > 1 or not self.parts[0].only_attends:
            return False
        (part,) = self.parts
        part.cache.batch_select_indices(index)
        part.rows_R, part.seen_RL = torch.arange(len(index), device=index.device), part.seen_RL[index]
        return True

    def _in_order(self, hidden: list[Tensor]) -> Tensor:
        if len(hidden) == 1:
            return hidden[0]
        rows_B = torch.cat([part.rows_R for part in self.parts])
        return torch.cat(hidden)[rows_B.argsort()]

    def _read(self, part: _Part, ids_RL: Tensor) -> Tensor:
        # transformers' bodies without attention multiply new inputs by the mask, which must then hold these alone.
        layers = getattr(part.cache, "layers", [])
        recurs = bool(layers) and not any(isinstance(layer, DynamicLayer) for layer in layers)
        mask_RL = part.seen_RL[:, -ids_RL.shape[1] :] if recurs else part.seen_RL
        output = self.policy.run_body(ids_RL, mask_RL, part.cache, use_cache=True)
        part.cache = getattr(output, self._cache_name, None)
        if part.cache is None:
            raise _refusal(self.policy, "gives no cache back")
        return output.last_hidden_state[:, -1]


def probe(policy: LanguageModel) -> tuple[PromptBatch, Tensor]:
    """Make two prompts of unequal lengths, and the next tokens [4, 2] of two rows each, to compare decoders on."""
    ids_BP = torch.arange(12, device=policy.device).view(2, 6) % policy.vocabulary
    mask_BP = torch.tensor([[False, False, True, True, True, True], [True] * 6], device=policy.device)
    next_B2 = torch.arange(8, device=policy.device).view(4, 2) % policy.vocabulary
    return PromptBatch(Prompts(ids_BP, mask_BP), rows=[{}, {}], batch=0, places=[0, 1]), next_B2


def reads_together(policy: LanguageModel) -> bool:
    """Say whether prompts of unequal lengths may be decoded in one batch, padded on the left.

    A few tokens, decoded over the model's own cache, are compared with a plain forward pass of each row.

    Raises:
        UserError: no way to decode gives what the plain forward pass gives, or there is no cache.
    """
    for together in (True, False):
        decoder = CacheDecoder(policy, together)
        try:
            off = _off(policy, decoder)
        except FAILURES as error:
            raise _refusal(policy, f"fails over its cache ({type(error).__name__}: {error})") from error
        if off is None:
            return together
    raise _refusal(policy, f"is off by {off:.2g} over its cache")


def _off(policy: LanguageModel, decoder: CacheDecoder) -> float | None:
    batch, next_B2 = probe(policy)
    ids_BP, mask_BP = batch.prompts
    with torch.autocast(policy.device.type, enabled=False):
        states = [decoder.prefill(batch, 2, 2), *(decoder.step(next_B) for next_B in next_B2.T)]
        for row, found_3H in enumerate(upcast(torch.stack(states, dim=1))):
            row_1L = torch.cat([ids_BP[row // 2][mask_BP[row // 2]], next_B2[row]])[None]
            own = policy.run_body(row_1L, torch.ones_like(row_1L, dtype=torch.bool))
            own_3H = upcast(own.last_hidden_state[0, -3:])
            off = distance(found_3H, own_3H, exact=not policy.is_quantised and states[0].dtype == own_3H.dtype)
            if off is not None:
                return off
    return None


def _refusal(policy: LanguageModel, why: str) -> UserError:
    expected, found = "a model that can be sampled token by token over a cache of its own", type(policy.body).__name__
    remedy = "Name another model, or sample with rollout.engine=vllm."
    return UserError(f"{policy.key}.path", expected, f"{found}, which {why}", remedy)
