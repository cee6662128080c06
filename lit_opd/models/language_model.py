"""A causal language model as distillation needs it: hidden states, the head, the stop tokens."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.errors import UserError
from lit_opd.functional import Head, head_logits
from lit_opd.functional.head import compute_dtype
from lit_opd.functional.precision import upcast
from lit_opd.models.llama import is_tied, llama_hidden, tied_embedding, unlike_llama
from lit_opd.models.packed_attention import packed_layers, unsupported
from lit_opd.models.packing import Layout, gather_rows, pack, pack_rollout
from lit_opd.types import Rollout

__all__ = ["LanguageModel"]

_log = logging.getLogger(__name__)


@dataclass
class _Place:
    """Where the weights of an offloaded model work, and its output layer, which stays there."""

    offload: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    head: tuple[Tensor, Tensor | None] | None = None


class LanguageModel:
    """A Hugging Face causal language model with its tokenizer.

    Deliberately no `nn.Module`: whoever trains it registers `.model`; a frozen teacher stays out of checkpoints,
    optimizers and train mode because nothing registers it.

    Args:
        model: a causal language model, or a `peft` wrapper of one.
        tokenizer: its tokenizer.
        key: `student`, `teacher` or `reference`, for messages.
        own_precision: run the body in the dtype of its weights, whatever autocast is in force.
        temperature: divides the logits wherever the model is asked for a distribution.
        offload: keep the weights in main memory, but for the output layer, except while the model is `evaluating`.

    Raises:
        UserError: the model's logits cannot be rebuilt from its last hidden states.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, key: str, own_precision: bool = False, temperature: float = 1.0,
        offload: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.key, self.own_precision = model, tokenizer, key, own_precision
        self.temperature = temperature
        # Shared by the copies of this object, as the weights are.
        self._place = _Place(offload)
        # Only a comparison of hidden states, which `why_padded` makes, can take this back.
        self.like_llama = True
        causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.causal_lm = causal_lm
        self.body: Any = causal_lm.base_model
        self.config: Any = causal_lm.config
        takes = inspect.signature(self.body.forward).parameters
        self._takes_positions = "position_ids" in takes
        # transformers 5.24 renamed `past_key_values` to `cache`: there the old name warns, in 5.40 it is gone.
        self.cache_name = next((name for name in ("cache", "past_key_values") if name in takes), None)
        self.vocabulary = self._output_layer().weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._output_layer().weight.device

    @property
    def head(self) -> Head:
        """The output layer, cut to the tokens that all models share."""
        layer, size = self._output_layer(), self.vocabulary
        weight, bias = self._place.head or (layer.weight, getattr(layer, "bias", None))
        if self._place.offload:  # who holds on to it must not see it leave with the layer
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if size < len(weight):
            weight, bias = weight[:size], None if bias is None else bias[:size]
        scale = getattr(self.config, "logit_scale", None) or 1 / (getattr(self.config, "logits_scaling", None) or 1)
        return Head(weight, bias, scale, getattr(self.config, "final_logit_softcapping", None), self.temperature)

    def untempered(self) -> LanguageModel:
        """The same model at temperature 1: what the yardsticks and samples of its own are made with."""
        other = copy.copy(self)
        other.temperature = 1.0
        return other

    def freeze(self) -> LanguageModel:
        """No gradient for any weight, eval mode, and the head checked; returns itself."""
        self.model.requires_grad_(False).eval()
        self.check_head()
        return self

    def to(self, device: torch.device) -> LanguageModel:
        """Move the weights, except quantised ones, which stay where they were loaded; returns itself.

        Of an offloaded model only the output layer moves, until it is `evaluating`.
        """
        if self._place.offload:
            self._place.device = device
            self._park()
        elif not getattr(self.causal_lm, "quantization_method", None):
            self.model.to(device)
        return self

    def _park(self) -> None:
        layer, device = self._output_layer(), self._place.device
        bias = getattr(layer, "bias", None)
        self._place.head = (layer.weight.detach().to(device), None if bias is None else bias.detach().to(device))
        self.model.to("cpu")

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends a completion: what the tokenizer, the generation config or the config names."""
        generation = getattr(self.causal_lm, "generation_config", None)
        named = [getattr(source, "eos_token_id", None) for source in (self.tokenizer, self.config, generation)]
        flat = [i for ids in named for i in (ids if isinstance(ids, list | tuple) else [ids])]
        # A config's default may lie outside a vocabulary that was cut down.
        return sorted({i for i in flat if i is not None and i < self.vocabulary})

    @property
    def pad_id(self) -> int:
        """The token that fills unused positions; what it is never matters, it is masked."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.stop_ids or [0])[0]

    def _output_layer(self) -> Any:
        layer = self.causal_lm.get_output_embeddings()
        if layer is None or not hasattr(layer, "weight"):
            raise UserError(f"{self.key}.path", "a causal language model with an output layer",
                            type(self.causal_lm).__name__, "Name the folder of a causal language model.")  # fmt: skip
        if hasattr(layer, "base_layer"):
            raise UserError(f"{self.key}.lora", "an output layer without adapter: its weight is used directly",
                            "one on it", "Leave it out of target_modules, or name it in modules_to_save.")  # fmt: skip
        return layer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside: no dropout. Modes, and the place of an offloaded model, are afterwards as they were."""
        modes = [(part, part.training) for part in self.model.modules()]
        self.model.eval()
        comes = self._place.head is not None
        if comes:
            self._place.head = None
            self.model.to(self._place.device)
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
            if comes:
                self._park()

    @contextmanager
    def precision(self, cache_casts: bool = False) -> Iterator[None]:
        """The arithmetic of this model: its weights' own, or the autocast in force.

        Args:
            cache_casts: keep low-precision copies of fp32 weights until the context ends, so that many forward passes
                over unchanged weights cast them once. Only right where no gradient is taken and no weight changes.
        """
        device = self.head.weight_VH.device.type  # where it works, also while it is away
        enabled = torch.is_autocast_enabled(device) and not self.own_precision
        dtype = torch.get_autocast_dtype(device)
        try:
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=enabled and cache_casts):
                yield
        finally:
            if cache_casts:
                # Within an outer autocast the cache would outlive this context, and the next optimizer step.
                torch.clear_autocast_cache()

    def run_body(self, ids_BL: Tensor, mask_BL: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        """The body's output for the last `ids_BL.shape[1]` positions of `mask_BL`.

        Positions count real tokens only, so that left padding changes nothing.

        Args:
            ids_BL: [B, L] new tokens.
            mask_BL: [B, past + L] True at real tokens, the cached ones included; [B, L] for a body without attention.
            cache: keys and values of the past, or None.
            use_cache: whether to return a cache.
        """
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL.long(), "use_cache": use_cache}
        if self._takes_positions:
            positions_BL = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BL[:, -ids_BL.shape[1] :]
        if cache is not None:
            inputs[str(self.cache_name)] = cache
        return self.body(**inputs)

    def counted_hidden(self, rollout: Rollout) -> Tensor:
        """Hidden states that predict each counted token: packed where the architecture allows, else padded.

        Args:
            rollout: prompts and completions.

        Returns:
            [N, H], row by row, in the dtype the body ran in.
        """
        return self.hidden_and_head(rollout)[0]

    def hidden_and_head(self, rollout: Rollout) -> tuple[Tensor, Head]:
        """`counted_hidden`, and the head to use with it: where weights are tied, so that their gradients meet."""
        if not rollout.mask_BT.any() or self._recomputes or self.why_padded:
            return self.padded_hidden(rollout), self.head
        (layout, predictors_N), head, table = pack_rollout(rollout), self.head, self._output_layer().weight
        embedded_NH = None
        if self._like_llama and is_tied(self.body.embed_tokens, table) and table.requires_grad:
            embedded_NH, table = tied_embedding(layout.ids_N, self.body.embed_tokens)
            head = replace(head, weight_VH=table[: self.vocabulary])
        return gather_rows(self.packed_hidden(layout, embedded_NH), predictors_N), head

    @property
    def _like_llama(self) -> bool:
        return self.like_llama and unlike_llama(self.body) is None

    def packed_hidden(self, layout: Layout, embedded_NH: Tensor | None = None) -> Tensor:
        """Hidden states [N, H] of the tokens of a layout."""
        with self.precision():
            if self._like_llama:
                return llama_hidden(self.body, layout, compute_dtype(self._output_layer().weight[:0]), embedded_NH)
            with packed_layers(self.body):
                inputs = {"input_ids": layout.ids_N[None], "position_ids": layout.positions_N[None], "layout": layout}
                return self.body(**inputs, use_cache=False).last_hidden_state[0]

    def padded_hidden(self, rollout: Rollout) -> Tensor:
        """What `counted_hidden` returns, with every row padded to the longest and nothing shared."""
        ids_BL = torch.cat([rollout.prompt_ids_BP, rollout.completion_ids_BT], dim=1)[:, :-1]
        mask_BL = torch.cat([rollout.prompt_mask_BP, rollout.completion_mask_BT], dim=1)[:, :-1]
        with self.precision():
            hidden_BLH = self.run_body(ids_BL, mask_BL).last_hidden_state
        return hidden_BLH[:, rollout.prompt_ids_BP.shape[1] - 1 :][rollout.mask_BT]

    @property
    def _recomputes(self) -> bool:
        # Layers that run again in the backward pass would find their own attention put back.
        return any(getattr(part, "gradient_checkpointing", False) for part in self.body.modules())

    @cached_property
    def why_padded(self) -> str | None:
        """Why this model's rows must be padded: its attention cannot be replaced by one that knows packed rows.

        None where they need not be, shown on a few tokens: packed and padded rows have the same hidden states.
        """
        self.like_llama = unlike_llama(self.body) is None
        if self.like_llama:
            self.like_llama = self._try_packing() is None
        reason = unsupported(self.body) if self._takes_positions else "it takes no positions"
        reason = None if self.like_llama else reason or self._try_packing()
        if reason:
            _log.warning(
                "The %s (%s) runs padded, and shares no prompts: %s.", self.key, type(self.body).__name__, reason
            )
        return reason

    @torch.no_grad()
    def _try_packing(self) -> str | None:
        # Rows that share a beginning, of unequal lengths, longer than the window that a small model may have.
        ids = [i % self.vocabulary for i in range(24)]
        rows = [ids, ids[:20] + ids[:2], ids[3:9]]
        with self.evaluating(), torch.autocast(self.device.type, enabled=False):
            layout, paths = pack(rows, self.device)
            try:
                packed_NH = upcast(self.packed_hidden(layout))
            except (NotImplementedError, TypeError) as error:
                return str(error)
            for row, path in zip(rows, paths, strict=True):
                row_1L = torch.tensor([row], device=self.device)
                own_LH = upcast(self.run_body(row_1L, torch.ones_like(row_1L, dtype=torch.bool)).last_hidden_state[0])
                off = ((packed_NH[path] - own_LH).norm() / own_LH.norm()).item()
                # The same sums in another order. Many layers of bf16 may grow that to several per cent; a token that
                # sees what it should not, or not what it should, is off by as much as it has.
                if not off < (1e-3 if packed_NH.dtype == self._output_layer().weight.dtype else 0.25):
                    return f"its packed hidden states are off by {off:.2g}"
        return None

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare the model's own logits with those rebuilt from hidden states, on a few tokens.

        Raises:
            UserError: they differ: the model does more after its last hidden state than is known here.
        """
        # Small ids, no special meaning: any tokens show whether the two paths agree.
        ids_BL = torch.arange(min(4, self.vocabulary), device=self.device)[None]
        mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        with self.evaluating(), torch.autocast(self.device.type, enabled=False):
            own = upcast(self.causal_lm(input_ids=ids_BL, attention_mask=mask_BL.long()).logits[0])
            rebuilt = head_logits(self.run_body(ids_BL, mask_BL).last_hidden_state[0], self.untempered().head)
        error = (own[:, : self.vocabulary] - rebuilt).abs().max().item() / max(own.abs().max().item(), 1e-6)
        if not error < 0.02:  # the same products, so only the rounding of bf16 may differ
            found = f"{type(self.causal_lm).__name__}, off by {error:.2g}"
            expected = "a model whose logits are a projection of its last hidden states"
            raise UserError(f"{self.key}.path", expected, found, "This architecture is not supported yet.")
