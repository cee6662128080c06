"""Give a causal language model the interface that distillation needs: hidden states, head, stop tokens.

Logits of all positions at once would not fit in memory, so a model hands out its hidden states and its head apart.
`Pair` makes these objects. Scorers, rollout engines and yardsticks use them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.errors import UserError
from lit_opd.functional import Head, head_logits
from lit_opd.functional.precision import upcast
from lit_opd.models.context import check_length, steady_length
from lit_opd.models.forward import FAILURES, Forward, choose_forward, circumstances
from lit_opd.models.stops import end_of_turn, named_ends
from lit_opd.types import Rollout

__all__ = ["LanguageModel"]


@dataclass
class _Place:
    """The device that an offloaded model works on, and its output layer, which stays there."""

    offload: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    head: tuple[Tensor, Tensor | None] | None = None


class LanguageModel:
    """A Hugging Face causal language model with its tokenizer.

    It is no `nn.Module` on purpose: the trainer registers the student's `.model`, and a frozen teacher, which nobody
    registers, stays out of checkpoints, optimizers and train mode.

    Args:
        model: a causal language model, or a `peft` wrapper of one.
        tokenizer: its tokenizer.
        key: `student`, `teacher` or `reference`, for messages.
        own_precision: run the body in the dtype of its weights, whatever autocast is in force.
        temperature: divides the logits wherever the model is asked for a distribution.
        offload: keep the weights in main memory while the model is not `present`, all but the output layer.

    Raises:
        UserError: the model's logits cannot be rebuilt from its last hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        key: str,
        own_precision: bool = False,
        temperature: float = 1.0,
        offload: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.key, self.own_precision = model, tokenizer, key, own_precision
        self.temperature = temperature
        # Shared by the copies of this object, as the weights are.
        self._place = _Place(offload)
        self._forwards: dict[Hashable, Forward] = {}
        causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.causal_lm = causal_lm
        # transformers' Llama4ForCausalLM names a prefix that it does not have, and is then its own base model.
        own = causal_lm.base_model is causal_lm
        self.body: Any = getattr(causal_lm, "model", causal_lm) if own else causal_lm.base_model
        self.config: Any = causal_lm.config
        takes = inspect.signature(self.body.forward).parameters
        self.takes_positions = "position_ids" in takes
        # transformers 5.24 renamed `past_key_values` to `cache`: there the old name warns, in 5.40 it is gone.
        self.cache_name = next((name for name in ("cache", "past_key_values") if name in takes), None)
        self.vocabulary = self.output_layer.weight.shape[0]
        self.steady_length = steady_length(self.config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.output_layer.weight.device

    @property
    def head(self) -> Head:
        """The output layer, cut to the tokens that all models share."""
        layer, size = self.output_layer, self.vocabulary
        weight, bias = self._place.head or (layer.weight, getattr(layer, "bias", None))
        if size < len(weight):
            weight, bias = weight[:size], None if bias is None else bias[:size]
        scale = getattr(self.config, "logit_scale", None) or 1 / (getattr(self.config, "logits_scaling", None) or 1)
        head = Head(weight, bias, scale, getattr(self.config, "final_logit_softcapping", None), self.temperature)
        # A kept head must not move when an offloaded model's parameters move to main memory.
        return head.detach() if self._place.offload else head

    def untempered(self) -> LanguageModel:
        """Copy this object, not its weights, at temperature 1: yardsticks and the model's own samples need that."""
        other = copy.copy(self)
        other.temperature = 1.0
        return other

    def freeze(self) -> LanguageModel:
        """Turn gradients off, switch to eval mode and check the head, and return the model."""
        self.model.requires_grad_(False).eval()
        self.check_head()
        return self

    def to(self, device: torch.device) -> LanguageModel:
        """Move the weights and return the model.

        Quantised weights stay where they were loaded. Of an offloaded model only the output layer moves, the rest
        when it is `present`.
        """
        if self._place.offload:
            self._place.device = device
            self._park()
        elif not self.is_quantised:
            self.model.to(device)
        return self

    def _park(self) -> None:
        layer, device = self.output_layer, self._place.device
        bias = getattr(layer, "bias", None)
        self._place.head = (layer.weight.detach().to(device), None if bias is None else bias.detach().to(device))
        self.model.to("cpu")

    @property
    def is_quantised(self) -> bool:
        """True where weights are quantised. In 8 bits the activations of a batch are rounded together."""
        return bool(getattr(self.causal_lm, "quantization_method", None))

    @property
    def stop_ids(self) -> list[int]:
        """All tokens that end a completion: those that tokenizer, generation config and config name."""
        generation = getattr(self.causal_lm, "generation_config", None)
        # A config's default may lie outside a vocabulary that was cut down.
        return sorted(i for i in named_ends((self.tokenizer, self.config, generation)) if i < self.vocabulary)

    def end_of_completion(self, chat: bool) -> int:
        """Choose the token that ends a completion: in a chat the end of a turn, else the tokenizer's own.

        Raises:
            UserError: there is none.
        """
        ends = [end_of_turn(self.tokenizer) if chat else None, self.tokenizer.eos_token_id, *self.stop_ids]
        for end in ends:
            if end is not None and end < self.vocabulary:
                return end
        expected, found = "a student with a token that ends a completion", "none"
        remedy = "Name one as eos_token_id in its generation_config.json."
        raise UserError("rollout.demonstrations", expected, found, remedy)

    @property
    def pad_id(self) -> int:
        """The token that fills masked positions, where its value has no effect."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.stop_ids or [0])[0]

    @property
    def output_layer(self) -> Any:
        """The module whose weight projects hidden states to logits.

        Raises:
            UserError: there is none, or it has an adapter.
        """
        layer = self.causal_lm.get_output_embeddings()
        if layer is None or not hasattr(layer, "weight"):
            expected, found = "a causal language model with an output layer", type(self.causal_lm).__name__
            raise UserError(f"{self.key}.path", expected, found, "Name the folder of a causal language model.")
        if hasattr(layer, "base_layer"):
            expected = "an output layer without adapter: its weight is used directly"
            remedy = "Leave it out of target_modules, or name it in modules_to_save."
            raise UserError(f"{self.key}.lora", expected, "one on it", remedy)
        return layer

    @contextmanager
    def present(self) -> Iterator[None]:
        """Bring the weights of an offloaded model to its device, and take them back to main memory afterwards."""
        comes = self._place.head is not None
        if comes:
            self._place.head = None
            self.model.to(self._place.device)
        try:
            yield
        finally:
            if comes:
                self._park()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the weights present and dropout off, and restore every module's mode afterwards."""
        modes = [(part, part.training) for part in self.model.modules()]
        self.model.eval()
        try:
            with self.present():
                yield
        finally:
            for part, training in modes:
                part.training = training

    @contextmanager
    def precision(self, cache_casts: bool = False) -> Iterator[None]:
        """Compute in this model's precision: that of its weights, or the autocast in force.

        Args:
            cache_casts: keep low-precision copies of fp32 weights until the context ends, so that many forward passes
                cast them once. Correct only where no gradient is taken and no weight changes.
        """
        device = self.head.weight_VH.device.type  # of the head, for an offloaded body may be in main memory now
        enabled = torch.is_autocast_enabled(device) and not self.own_precision
        dtype = torch.get_autocast_dtype(device)
        try:
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=enabled and cache_casts):
                yield
        finally:
            if cache_casts:
                # torch empties the cache when the outermost autocast ends, which may be after an optimizer step: the
                # next pass would then run with the old weights.
                torch.clear_autocast_cache()

    def run_body(self, ids_BL: Tensor, mask_BL: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        """Run the body over the last `ids_BL.shape[1]` positions of `mask_BL`.

        Positions count real tokens only, so that left padding changes nothing.

        Args:
            ids_BL: [B, L] new tokens.
            mask_BL: [B, past + L] True at real tokens, the cached ones included; [B, L] for a body without attention.
            cache: keys and values of the past, or None.
            use_cache: return a cache.
        """
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL.long(), "use_cache": use_cache}
        if self.takes_positions:
            positions_BL = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BL[:, -ids_BL.shape[1] :]
        if cache is not None:
            inputs[str(self.cache_name)] = cache
        return self.body(**inputs)

    @property
    def forward(self) -> Forward:
        """The way in which the body runs, chosen anew when hooks, shards or checkpointing were added."""
        found = circumstances(self.body)
        if found not in self._forwards:
            self._forwards[found] = choose_forward(self)
        return self._forwards[found]

    def hidden(self, rollout: Rollout) -> tuple[Tensor, Head]:
        """Read prompts and completions.

        Args:
            rollout: prompts, completions, and which of their tokens count.

        Returns:
            [N, H] hidden states that predict each counted token, row by row, in the dtype the body ran in, and the
            head to use with them. Where weights are tied that is not `head`, so that both gradients add up in place.
        """
        check_length(self, rollout.prompts.ids_BP.shape[1] + rollout.ids_BT.shape[1])
        return self.forward.hidden(self, rollout)

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare the model's own logits with those rebuilt from hidden states, on a few tokens.

        Raises:
            UserError: they differ, for the model does more after its last hidden state than `Head` knows.
        """
        # Any tokens show whether the two paths agree.
        ids_BL = torch.arange(min(4, self.vocabulary), device=self.device)[None]
        mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        expected = "a model whose logits are a projection of its last hidden states"
        kind, remedy = type(self.causal_lm).__name__, "This architecture is not supported yet."
        try:
            with self.evaluating(), torch.autocast(self.device.type, enabled=False):
                own = upcast(self.causal_lm(input_ids=ids_BL, attention_mask=mask_BL.long()).logits[0])
                rebuilt = head_logits(self.run_body(ids_BL, mask_BL).last_hidden_state[0], self.untempered().head)
        except FAILURES as failure:
            raise UserError(f"{self.key}.path", expected, f"{kind}: {failure}", remedy) from failure
        if not own.isfinite().all():
            found = f"others in {self.output_layer.weight.dtype}"
            finite = f"Set {self.key}.dtype=float32. If that does not help, the weights are damaged."
            raise UserError(f"{self.key}.dtype", "logits that are finite", found, finite)
        error = (own[:, : self.vocabulary] - rebuilt).abs().max().item() / max(own.abs().max().item(), 1e-6)
        if not error < 0.02:  # both are the same products, rounded to bf16 at different places
            raise UserError(f"{self.key}.path", expected, f"{kind}, off by {error:.2g}", remedy)
