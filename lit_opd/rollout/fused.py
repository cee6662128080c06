"""Run the body of a Llama-like model token by token, faster than its own code does.

For one token a row, a general implementation spends most of its time outside matrix products: casting weights, growing
its cache, making masks, starting many small operations. Here weights are cast once a rollout, projections that share an
input are one product, the cache has its final size from the beginning, and the prompts' shared beginnings are computed
once. `LocalEngine` uses it where the model's structure allows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lit_opd.functional.head import compute_dtype
from lit_opd.models import LanguageModel
from lit_opd.models.llama import LayerProducts, has_hooks, rms_norm, rotation, run_layer, unlike_llama
from lit_opd.models.packed_attention import attend
from lit_opd.models.packing import pack
from lit_opd.rollout.products import Product, make_product
from lit_opd.types import PromptBatch

__all__ = ["FusedDecoder", "why_not_fused"]


def why_not_fused(policy: LanguageModel) -> str | None:
    """Say why `FusedDecoder` cannot run a model, None where it knows the model's structure."""
    reason = unlike_llama(policy.body)
    if reason:
        return reason
    layers = [part for layer in policy.body.layers for part in (*layer.self_attn.children(), *layer.mlp.children())]
    # The class itself, for some adapters and quantised layers are subclasses of it.
    projections = [p for p in layers if isinstance(getattr(p, "weight", None), Tensor) and p.weight.dim() > 1]
    if has_hooks(projections):
        return "it has hooks"
    if any(type(part) is not nn.Linear for part in projections) or len(projections) != 7 * len(policy.body.layers):
        return "its projections are not plain linear layers"
    return None


def _decode_products(layer: Any, dtype: torch.dtype, rows: int) -> LayerProducts:
    """Make the products of a layer in the dtype of decoding, joining those that share an input."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, rows)
    sizes = [attention.q_proj.out_features + attention.k_proj.out_features, attention.v_proj.out_features]
    gate_up = _joined([mlp.gate_proj, mlp.up_proj], dtype, rows)

    def qk_v(x: Tensor) -> tuple[Tensor, Tensor]:
        qk, value = qkv(x).split(sizes, dim=-1)
        return qk, value

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return gate, up

    return LayerProducts(qk_v, _joined([attention.o_proj], dtype, rows), halves, _joined([mlp.down_proj], dtype, rows))


def _joined(parts: list[nn.Linear], dtype: torch.dtype, rows: int) -> Product:
    weight = parts[0].weight.to(dtype) if len(parts) == 1 else torch.cat([p.weight.to(dtype) for p in parts])
    bias = None if parts[0].bias is None else torch.cat([p.bias.to(dtype) for p in parts])
    return make_product(weight, bias, rows)


class FusedDecoder:
    """A `Decoder` for models whose `why_not_fused` is None.

    Prompts end at the same column of the cache, so that all rows write the same column. Columns before the beginning of
    a shorter prompt are masked.

    Args:
        policy: the model; its weights are copied now, in the dtype of the products.
        rows: how many rows it will mostly decode.
    """

    def __init__(self, policy: LanguageModel, rows: int) -> None:
        body, config = policy.body, policy.body.config
        self._body = body
        self.dtype = compute_dtype(body.embed_tokens.weight[:0])
        self._layers = [(layer, _decode_products(layer, self.dtype, rows)) for layer in body.layers]
        attention = body.layers[0].self_attn
        self._size, self._scale = attention.head_dim, attention.scaling
        self._groups = config.num_key_value_heads
        self._caches: list[Tensor] = []
        self._bias_BL = self._place_B = self._cos_L1D = self._sin_L1D = torch.empty(0)
        self._column = 0

    @torch.no_grad()
    def prefill(self, batch: PromptBatch, num_completions: int, length: int) -> Tensor:
        """See `Decoder.prefill`."""
        rows = [ids[mask].tolist() for ids, mask in zip(*batch.prompts, strict=True)]
        layout, paths = pack(rows, batch.prompts.ids_BP.device)
        width = max(map(len, paths))
        columns_BP = torch.tensor([[0] * (width - len(path)) + path for path in paths], device=layout.ids_N.device)
        self._place_B = torch.tensor([len(path) for path in paths], device=layout.ids_N.device)
        self._reserve(num_completions * len(rows), width, length)
        self._bias_BL.view(len(rows), num_completions, -1)[:, :, :width].masked_fill_(
            (torch.arange(width, device=columns_BP.device) < width - self._place_B[:, None])[:, None], -torch.inf
        )
        hidden_NH = self._body.embed_tokens(layout.ids_N)
        turn = self._cos_L1D[layout.positions_N], self._sin_L1D[layout.positions_N]
        for number, (layer, products) in enumerate(self._layers):

            def attention(query: Tensor, key: Tensor, value: Tensor, cache: Tensor = self._caches[number]) -> Tensor:
                for kept, new in zip(cache, (key, value), strict=True):
                    kept[:, :, :width] = new[columns_BP].transpose(1, 2).repeat_interleave(num_completions, dim=0)
                return attend(query, key, value, layout, self._scale)

            hidden_NH = run_layer(layer, products, hidden_NH, turn, attention, self.dtype)
        self._place_B = self._place_B.repeat_interleave(num_completions)
        last_BH = hidden_NH[columns_BP[:, -1]]
        return rms_norm(last_BH, self._body.norm, last_BH.dtype).repeat_interleave(num_completions, dim=0)

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> Tensor:
        """See `Decoder.step`."""
        hidden_BH = self._body.embed_tokens(ids_B)
        turn = self._cos_L1D[self._place_B], self._sin_L1D[self._place_B]
        column = self._column
        bias_B11L = self._bias_BL[:, None, None, : column + 1]
        for number, (layer, products) in enumerate(self._layers):

            def attention(query: Tensor, key: Tensor, value: Tensor, cache: Tensor = self._caches[number]) -> Tensor:
                cache[0][:, :, column], cache[1][:, :, column] = key, value
                # A group's queries take the place of positions, so that the kernel reads its keys once for them all.
                grouped = query.view(len(query), self._groups, -1, self._size)
                keys, values = cache[0][:, :, : column + 1], cache[1][:, :, : column + 1]
                return scaled_dot_product_attention(grouped, keys, values, bias_B11L, scale=self._scale)

            hidden_BH = run_layer(layer, products, hidden_BH, turn, attention, self.dtype)
        self._column += 1
        self._place_B = self._place_B + 1
        return rms_norm(hidden_BH, self._body.norm, hidden_BH.dtype)

    def keep(self, index: Tensor) -> bool:
        """See `Decoder.keep`."""
        self._caches = [cache[:, index] for cache in self._caches]
        self._bias_BL, self._place_B = self._bias_BL[index], self._place_B[index]
        return True

    def _reserve(self, rows: int, width: int, length: int) -> None:
        weight = self._body.embed_tokens.weight
        shape = (2, rows, self._groups, width + length, self._size)
        # Zeros, for uninitialised memory may hold NaN, and 0 x NaN in a masked column is NaN.
        self._caches = [torch.zeros(shape, dtype=self.dtype, device=weight.device) for _ in self._layers]
        self._bias_BL = torch.zeros(rows, width + length, dtype=self.dtype, device=weight.device)
        positions_L = torch.arange(width + length, device=weight.device)
        self._cos_L1D, self._sin_L1D = rotation(self._body, positions_L, weight[:1])
        self._column = width
