"""Run the body of a Llama-like model token by token, faster than its own code does.

For one token a row, a general implementation spends most of its time outside matrix products: casting weights, growing
its cache, making masks, starting many small operations. Here weights are cast once a rollout, projections that share an
input are one product, the cache has its final size from the beginning, and the prompts' shared beginnings are computed
once. Shapes can be static, so that a token's work is captured once and replayed. `LocalEngine` uses it where the
model's structure allows.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from lit_opd.functional.head import compute_dtype
from lit_opd.models import LanguageModel
from lit_opd.models.llama import LayerProducts, rms_norm, rotation, run_layer, unlike_llama, window_of
from lit_opd.models.packed_attention import attend
from lit_opd.models.packing import pack
from lit_opd.rollout.lora_weights import plain_layer, why_not_merged
from lit_opd.rollout.places import Places
from lit_opd.rollout.products import Products
from lit_opd.rollout.token_parts import PLAIN, Column, Norms, TokenParts
from lit_opd.types import PromptBatch

__all__ = ["FusedDecoder", "why_not_fused"]


def why_not_fused(policy: LanguageModel) -> str | None:
    """Say why `FusedDecoder` cannot run a model, None where it knows the model's structure."""
    reason = unlike_llama(policy.body)
    if reason:
        return reason
    parts = [part for layer in policy.body.layers for part in (*layer.self_attn.children(), *layer.mlp.children())]
    projections = [p for p in parts if isinstance(getattr(p, "weight", None), Tensor) and p.weight.dim() > 1]
    reason = next(filter(None, map(why_not_merged, projections)), None)
    if reason is None and len(projections) != 7 * len(policy.body.layers):
        return "its projections are not plain linear layers"
    return reason


def _decode_products(layer: Any, products: Products) -> LayerProducts:
    """Make the products of a layer, joining those that share an input."""
    attention, mlp = layer.self_attn, layer.mlp
    query, key, value = (plain_layer(x).out_features for x in (attention.q_proj, attention.k_proj, attention.v_proj))
    qkv = products.of([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = products.of([mlp.gate_proj, mlp.up_proj])

    def qk_v(x: Tensor) -> tuple[Tensor, Tensor]:
        qk, v = qkv(x).split([query + key, value], dim=-1)
        return qk, v

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return gate, up

    return LayerProducts(qk_v, products.of([attention.o_proj]), halves, products.of([mlp.down_proj]))


def _norms(attention: Any) -> Norms | None:
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon


class FusedDecoder:
    """A `Decoder` for models whose `why_not_fused` is None.

    Args:
        policy: the model; its weights are copied now, in the dtype of the products.
        rows: how many rows it will mostly decode.
        lasting: keep all tensors where they are from one rollout to the next, and let none of them shrink.
        parts: what computes a token.
    """

    def __init__(self, policy: LanguageModel, rows: int, lasting: bool = False, parts: TokenParts = PLAIN) -> None:
        body, config = policy.body, policy.body.config
        self._body, self._lasting, self.parts = body, lasting, parts
        self.dtype = compute_dtype(body.embed_tokens.weight[:0])
        self._products = Products(self.dtype, rows, lasting)
        self._layers = [(layer, _decode_products(layer, self._products)) for layer in body.layers]
        attention = body.layers[0].self_attn
        self._size, self._scale = attention.head_dim, attention.scaling
        self._groups = config.num_key_value_heads
        self._windows = [window_of(layer.self_attn) for layer in body.layers]
        self.column, self.room = 0, (0, 0)
        self._caches: list[Tensor] = []
        self.places = Places(0, 0, self.dtype, policy.device)

    def refresh(self) -> None:
        """Copy the model's present weights in place."""
        self._products.refresh()

    @torch.no_grad()
    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """See `Decoder.prefill`."""
        rows = [list(compress(*row)) for row in zip(*(held.tolist() for held in batch.prompts), strict=True)]
        layout, paths = pack(rows, batch.prompts.ids_BP.device)
        width = max(map(len, paths))
        columns_BP = torch.tensor([[0] * (width - len(path)) + path for path in paths], device=layout.ids_N.device)
        lengths_B = torch.tensor([len(path) for path in paths], device=layout.ids_N.device)
        self.reserve(num_completions * len(rows), width + length)
        self._begin(lengths_B.repeat_interleave(num_completions), width)
        hidden_NH = self._body.embed_tokens(layout.ids_N)
        turn = self._cos_M1D[layout.positions_N], self._sin_M1D[layout.positions_N]
        for number, (layer, products) in enumerate(self._layers):

            def attention(query: Tensor, key: Tensor, value: Tensor, number: int = number) -> Tensor:
                cache = self._caches[number][:, : num_completions * len(rows), :, :width]
                for kept, new in zip(cache, (key, value), strict=True):
                    kept[:] = new[columns_BP].transpose(1, 2).repeat_interleave(num_completions, dim=0)
                return attend(query, key, value, layout, self._scale, self._windows[number])

            hidden_NH = run_layer(layer, products, hidden_NH, turn, attention, self.dtype)
        last_BH = hidden_NH[columns_BP[:, -1]]
        return rms_norm(last_BH, self._body.norm, last_BH.dtype).repeat_interleave(num_completions, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """See `Decoder.step`."""
        hidden_BH = self.run(ids_B, self.column + 1, self.column)
        self.column += 1
        return hidden_BH

    @torch.no_grad()
    def run(self, ids_B: Tensor, width: int, column: Column) -> Tensor:
        """Append one token to every row at a column, looking at the first `width` columns, and move on on the device.

        Nothing here depends on data but what is on the device, and `self.column` stays.
        """
        rows, parts = len(ids_B), self.parts
        seen, place_B = self.places.open(rows, width, column), self.places.place_R[:rows]
        within = {window: seen.within(window) for window in set(self._windows)}
        hidden_BH = self._body.embed_tokens(ids_B)
        turn = self._cos_M1D[place_B], self._sin_M1D[place_B]
        for number, (layer, products) in enumerate(self._layers):
            cache = self._caches[number][:, :rows, :, :width]
            qk, value = products.qk_v(self._normed(hidden_BH, layer.input_layernorm, self.dtype))
            qk, value = qk.view(rows, -1, self._size), value.view(rows, -1, self._size)
            query = parts.rotate_and_store(qk, value, turn, cache, column, _norms(layer.self_attn))
            mixed = parts.attend(query, cache[0], cache[1], within[self._windows[number]], self._scale)
            hidden_BH = hidden_BH + products.out(mixed.reshape(rows, -1))
            gate, up = products.gate_up(self._normed(hidden_BH, layer.post_attention_layernorm, self.dtype))
            hidden_BH = hidden_BH + products.down(parts.gate(gate, up, layer.mlp.act_fn))
        self.places.advance(rows)
        return self._normed(hidden_BH, self._body.norm, hidden_BH.dtype)

    def _normed(self, hidden_BH: Tensor, own: Any, dtype: torch.dtype) -> Tensor:
        return self.parts.norm(hidden_BH, own.weight, own.variance_epsilon, dtype)

    def keep(self, index: Tensor) -> bool:
        """See `Decoder.keep`."""
        self.places.select(index)
        if self._lasting:
            for cache in self._caches:
                cache[:, : len(index)] = cache[:, index]
        else:
            self._caches = [cache[:, index] for cache in self._caches]
        return True

    def reserve(self, rows: int, width: int) -> None:
        """Make room for so many rows and columns: exactly so many, or if lasting, at least."""
        if self._lasting:
            wanted = max(rows, self.room[0]), max(width, self.room[1])
            if wanted == self.room:
                return
            rows, width = wanted
        weight = self._body.embed_tokens.weight
        self._caches = []  # freed before the larger ones are made
        shape = (2, rows, self._groups, width, self._size)
        self._caches = [torch.zeros(shape, dtype=self.dtype, device=weight.device) for _ in self._layers]
        self.places = Places(rows, width, self.dtype, weight.device)
        self._cos_M1D, self._sin_M1D = rotation(self._body, torch.arange(width, device=weight.device), weight[:1])
        self.room = rows, width

    def _begin(self, lengths_B: Tensor, width: int) -> None:
        """Forget what earlier rollouts wrote, and let rows look at their prompts, which end before column `width`."""
        for cache in self._caches if self._lasting else ():
            cache.zero_()  # a NaN of an earlier rollout would be one in a masked column, too: 0 x NaN is NaN
        self.places.begin(lengths_B, width)
        self.column = width
