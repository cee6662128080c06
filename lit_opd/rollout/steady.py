"""Run a model's own code for one token a row, over states that stay where they are.

The caches of transformers grow with every token, so that no captured graph could be replayed over them. Here all states
have their final size and place from the beginning. `CapturedWriter` decodes so what is not built like Llama: hybrids
with linear attention, experts, other layers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lit_opd.functional.head import compute_dtype
from lit_opd.models import LanguageModel
from lit_opd.models.forward import FAILURES
from lit_opd.rollout.decoders import CacheDecoder
from lit_opd.rollout.layer_states import LayerStates, is_known
from lit_opd.rollout.places import Places
from lit_opd.rollout.token_parts import PLAIN, Column, Seen
from lit_opd.types import PromptBatch, Prompts

__all__ = ["SteadyDecoder", "why_not_steady"]

# What layers do, as configurations name it. Others see other columns than `_mask` says: those of a chunk, or chosen.
_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba",
          "attention", "moe", "mlp"}  # fmt: skip


def why_not_steady(policy: LanguageModel) -> str | None:
    """Say why `SteadyDecoder` cannot run a model, None where it knows all states of the model's cache."""
    others = sorted(set(getattr(policy.body.config, "layer_types", None) or ()) - _TYPES)
    if others:
        return f"it has layers of type {', '.join(others)}"
    try:
        cache = _cache_of_one(policy)
    except FAILURES as error:
        return f"it fails over its cache ({type(error).__name__}: {error})"
    if type(cache) is not DynamicCache or not all(map(is_known, cache.layers)):
        return "its cache holds states of its own kind"
    return None


def _cache_of_one(policy: LanguageModel) -> Any:
    decoder, ids_11 = CacheDecoder(policy), torch.zeros(1, 1, dtype=torch.long, device=policy.device)
    decoder.prefill(PromptBatch(Prompts(ids_11, torch.ones_like(ids_11, dtype=torch.bool)), [{}], 0, [0]), 1, 1)
    return decoder.parts[0].cache


class SteadyDecoder:
    """A `Decoder` for models whose `why_not_steady` is None.

    It reads the model's own weights, in the precision in which it was made.

    Args:
        policy: the model.
        together: prompts of unequal lengths are read in one batch, as `CacheDecoder` says.
    """

    def __init__(self, policy: LanguageModel, together: bool) -> None:
        self._policy, self._together, self.parts = policy, together, PLAIN
        self.dtype = compute_dtype(policy.head.weight_VH[:0])
        self._autocast = torch.is_autocast_enabled(policy.device.type)
        with self._precision():
            self._cache = _cache_of_one(policy)
        attends = [layer for layer in self._cache.layers if hasattr(layer, "keys")]
        self._windows = {getattr(layer, "sliding_window", None) for layer in attends}
        self._states: list[LayerStates] = []
        self.column, self.room = 0, (0, 0)
        self.places = Places(0, 0, self.dtype, policy.device)

    def _precision(self) -> torch.autocast:
        # Without autocast's cache: a graph would go on to read cast weights that it has freed.
        dtype = self.dtype if self._autocast else None
        return torch.autocast(self._policy.device.type, dtype=dtype, enabled=self._autocast, cache_enabled=False)

    def refresh(self) -> None:
        """Do nothing, for no weight was copied."""

    def reserve(self, rows: int, width: int) -> None:
        """Make room for at least so many rows and columns."""
        room = max(rows, self.room[0]), max(width, self.room[1])
        if room != self.room:
            self._states = []  # freed before the larger ones are made
            self._states = [LayerStates(layer, *room) for layer in self._cache.layers]
            dtype = self._policy.body.get_input_embeddings().weight.dtype
            self.places, self.room = Places(*room, dtype, self._policy.device), room

    @torch.no_grad()
    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """See `Decoder.prefill`. Each prompt is read once, over the model's own cache."""
        lengths_B, width = batch.prompts.mask_BP.sum(1), batch.prompts.ids_BP.shape[1]
        self.reserve(len(lengths_B) * num_completions, width + length)
        decoder = CacheDecoder(self._policy, self._together)
        with self._precision():
            hidden_BH = decoder.prefill(batch, 1, length)
        completions = torch.arange(num_completions, device=lengths_B.device)
        for number, states in enumerate(self._states):
            states.clear()
            for part in decoder.parts:
                rows_R = (part.rows_R[:, None] * num_completions + completions).flatten()
                states.take(part.cache.layers[number], rows_R, num_completions, width)
        self.places.begin(lengths_B.repeat_interleave(num_completions), width)
        self.column = width
        return hidden_BH.repeat_interleave(num_completions, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """See `Decoder.step`."""
        hidden_BH = self.run(ids_B, self.column + 1, self.column)
        self.column += 1
        return hidden_BH

    @torch.no_grad()
    def run(self, ids_B: Tensor, width: int, column: Column) -> Tensor:
        """Append one token to every row, as `FusedDecoder.run` does."""
        policy, rows = self._policy, len(ids_B)
        mask, cache = self._mask(self.places.open(rows, width, column)), copy.copy(self._cache)
        cache.layers = [states.at(rows, width, column) for states in self._states]
        inputs = {"input_ids": ids_B[:, None], "attention_mask": mask, str(policy.cache_name): cache, "use_cache": True}
        if policy.takes_positions:
            inputs["position_ids"] = self.places.place_R[:rows, None]
        with self._precision():
            hidden_BH = policy.body(**inputs).last_hidden_state[:, 0]
        self.places.advance(rows)
        return hidden_BH

    def _mask(self, seen: Seen) -> Any:
        """Make a mask with four dimensions, or one for each kind of layer, which transformers takes as they are."""
        biases = {window: seen.within(window).bias_BM[:, None, None] for window in self._windows}
        if len(biases) < 2:
            return next(iter(biases.values()), None)
        masks: dict[str, Tensor | None] = dict.fromkeys(self._policy.body.config.layer_types)
        for window, bias_B11M in biases.items():
            masks["full_attention" if window is None else "sliding_attention"] = bias_B11M
        return masks

    def keep(self, index: Tensor) -> bool:
        """See `Decoder.keep`."""
        self.places.select(index)
        for states in self._states:
            states.select(index)
        return True
