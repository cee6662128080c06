"""Make matrix products of a few rows fast, where the same weights are used many times.

Decoding multiplies a handful of rows by every weight at every token. `FusedDecoder` and `Writer` make their products
here, once a rollout, or once for all rollouts with weights that are copied in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_opd.rollout.merging import merged_weight, plain_layer

__all__ = ["Product", "Products", "make_product"]

Product = Callable[[Tensor], Tensor]


class Products:
    """Makes the products of a decoder.

    Args:
        dtype: of the products.
        rows: how many rows they will mostly have.
        lasting: keep the weights, so that `refresh` can copy them anew to where they are.
    """

    def __init__(self, dtype: torch.dtype, rows: int, lasting: bool = False) -> None:
        self.dtype, self._rows, self._lasting = dtype, rows, lasting
        self._kept: list[tuple[list[Any], Tensor, Tensor | None]] = []

    def of(self, layers: list[Any]) -> Product:
        """Make one product of linear layers that share an input, their outputs side by side."""
        weights = [merged_weight(layer).to(self.dtype) for layer in layers]
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [bias.to(self.dtype) for bias in map(_bias, layers) if bias is not None]
        bias_O = torch.cat(biases) if biases else None
        if not self._lasting:
            return make_product(weight_OI, bias_O, self._rows)
        self._kept.append((layers, weight_OI, bias_O))
        return lambda x: linear(x, weight_OI, bias_O)

    def refresh(self) -> None:
        """Copy the layers' present weights into the products, in place."""
        for layers, weight_OI, bias_O in self._kept:
            sizes = [plain_layer(layer).out_features for layer in layers]
            for target, layer in zip(weight_OI.split(sizes), layers, strict=True):
                overwrite(target, merged_weight(layer))
            if bias_O is not None:
                for target, layer in zip(bias_O.split(sizes), layers, strict=True):
                    overwrite(target, _bias(layer))


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy a tensor in place, unless both are the same memory."""
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)


def _bias(layer: Any) -> Any:
    return plain_layer(layer).bias


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
