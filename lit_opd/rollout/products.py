"""Make matrix products of a few rows fast, where the same weights are used many times.

Decoding multiplies a handful of rows by every weight at every token. `FusedDecoder` and `LocalEngine` call this once a
rollout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Product", "make_product"]

Product = Callable[[Tensor], Tensor]


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
