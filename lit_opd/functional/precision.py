"""The one rule on floating-point width: maths on log-probabilities is never done below fp32."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_softmax", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """`x` in fp32, or in float64 where it already is: reverse KL in bf16 is noise at the values that matter."""
    return x if x.dtype == torch.float64 else x.float()


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in nats over the last dimension, in fp32 (float64 stays).

    >>> log_softmax(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return torch.log_softmax(upcast(logits), dim=-1)
