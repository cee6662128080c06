"""Make matrix products of a few rows fast, where the same weights are used many times.

Decoding multiplies a handful of rows by every weight at every token. `FusedDecoder` and `Writer` make their products
here, once a rollout, or once for all rollouts with weights that are copied in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_opd.rollout.lora_weights import adapters_beside, merged_weight, plain_layer

__all__ = ["Product", "Products", "make_product", "overwrite"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Weights:
    """The weights that a product of layers with one input multiplies by.

    Attributes:
        weight_OI: their weights below one another.
        bias_O: their biases, or None.
        beside: what their adapters add, [R, I] and [O, R], where it is not in the weight.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    beside: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, layers: list[Any], dtype: torch.dtype) -> _Weights:
        weights = [merged_weight(layer).to(dtype) for layer in layers]
        biases = [bias.to(dtype) for layer in layers if (bias := plain_layer(layer).bias) is not None]
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        return cls(weight_OI, torch.cat(biases) if biases else None, adapters_beside(layers, dtype))

    def refresh(self, layers: list[Any]) -> None:
        """Copy the present weights of the layers in place, of which the same adapters must be on."""
        sizes = [plain_layer(layer).out_features for layer in layers]
        for target, layer in zip(self.weight_OI.split(sizes), layers, strict=True):
            overwrite(target, merged_weight(layer))
        for target, layer in zip(() if self.bias_O is None else self.bias_O.split(sizes), layers, strict=False):
            overwrite(target, plain_layer(layer).bias)
        for target, source in zip(self.beside or (), adapters_beside(layers, self.weight_OI.dtype) or (), strict=True):
            overwrite(target, source)


class Products:
    """Makes the products of a decoder.

    Args:
        dtype: of the products.
        rows: how many rows they will mostly have.
        lasting: keep the weights, so that `refresh` can copy them anew to where they are.
    """

    def __init__(self, dtype: torch.dtype, rows: int, lasting: bool = False) -> None:
        self._dtype, self._rows, self._lasting = dtype, rows, lasting
        self._kept: list[tuple[list[Any], _Weights]] = []

    def of(self, layers: list[Any]) -> Product:
        """Make one product of linear layers that share an input, their outputs side by side."""
        weights = _Weights.of(layers, self._dtype)
        if self._lasting:
            self._kept.append((layers, weights))
            plain: Product = partial(linear, weight=weights.weight_OI, bias=weights.bias_O)
        else:
            plain = make_product(weights.weight_OI, weights.bias_O, self._rows)
        if weights.beside is None:
            return plain
        to_rank_RI, from_rank_OR = weights.beside
        return lambda x: torch.addmm(plain(x), linear(x, to_rank_RI), from_rank_OR.T)

    def refresh(self) -> None:
        """Copy the layers' present weights into the products, in place."""
        for layers, weights in self._kept:
            weights.refresh(layers)


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy a tensor in place, unless both are the same memory."""
    if target.data_ptr() != source.data_ptr():
        target.copy_(source.detach())


def make_product(weight_OI: Tensor, bias_O: Tensor | None, rows: int) -> Product:
    """Make `linear(x, weight, bias)` a function of x [N, I] alone.

    On a CPU in bf16, oneDNN's kernels want another layout of the weight, and make it anew at every call, so that
    decoding takes twice as long. Here the weight is laid out once, for an x that mostly has `rows` rows. All tensors
    have the dtype of the product.
    """
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16 or not _has_bf16_kernels():
        return lambda x: linear(x, weight_OI, bias_O)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")


def _has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
