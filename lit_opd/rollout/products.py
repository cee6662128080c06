"""Matrix products with a few rows, many times over the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Product", "make_product"]

Product = Callable[[Tensor], Tensor]


def make_product(weight_OI: Tensor, bias_O: Tensor | None, rows: int) -> Product:
    """`linear(x, weight, bias)` as a function of x [N, I] alone.

    On a CPU in bf16 the weight is laid out once as oneDNN's kernels want it; left as it is, every call does so again,
    and decoding, which reads each weight for a handful of rows, takes twice as long.

    Args:
        weight_OI: [O, I] in the dtype of the product.
        bias_O: [O] or None.
        rows: how many rows x will mostly have.
    """
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16 or not _has_bf16_kernels():
        return lambda x: linear(x, weight_OI, bias_O)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")


def _has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
