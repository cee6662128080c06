"""Raise log-probabilities to fp32 before any maths, the one rule on floating-point width.

In bf16, neighbouring values near -1 are 0.004 nats apart, more than many a KL. Every function of this room and every
estimator starts with `upcast`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_softmax", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """Raise a tensor to fp32 unless it is float64, for a reverse KL in bf16 is noise at the values that matter.

    >>> upcast(torch.zeros(1, dtype=torch.bfloat16)).dtype, upcast(torch.zeros(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x if x.dtype == torch.float64 else x.float()


def log_softmax(logits: Tensor) -> Tensor:
    """Compute log-probabilities in nats over the last dimension, in fp32 (float64 stays).

    >>> log_softmax(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return torch.log_softmax(upcast(logits), dim=-1)
