"""Credit that flows to earlier positions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["return_to_go"]


def return_to_go(values_BT: Tensor, gamma: float) -> Tensor:
    """Discounted sum of this and all later values: R_t = sum over i >= t of gamma^(i - t) v_i.

    The discount is relative to t, so that gamma = 0 gives the values themselves and gamma = 1 plain suffix sums. Mask
    the values first: what is masked must be zero here, or it leaks into every earlier return.

    Args:
        values_BT: [B, T] one value a position, zero where masked.
        gamma: discount, 0 to 1.

    Returns:
        [B, T] returns, in the units of the values.

    Raises:
        ValueError: `gamma` outside [0, 1].

    >>> import torch
    >>> return_to_go(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    tensor([[3., 4., 4.]])
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], found {gamma}")
    returns_BT = values_BT
    shift = 1
    # Each pass doubles how far ahead a position sees: log2(T) tensor operations instead of T.
    while gamma > 0 and shift < values_BT.shape[1]:
        returns_BT = returns_BT + gamma**shift * pad(returns_BT[:, shift:], (0, shift))
        shift *= 2
    return returns_BT
