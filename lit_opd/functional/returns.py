"""Sum costs over later positions, and compare them with those of other completions.

What a token causes shows in the tokens after it: estimators of the families `sequence` and `hybrid` weigh its score by
these sums, and take out of them what other completions of the prompt have as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import SHARE, at_least

__all__ = ["k_step_return", "leave_one_out_mean", "remaining_mean", "return_to_go"]


def return_to_go(values_BT: Tensor, gamma: float) -> Tensor:
    """Sum this and all later values with a discount, R_t = sum over i >= t of gamma^(i - t) v_i.

    The discount, in [0, 1], is relative to t, so that gamma = 0 gives the values themselves and gamma = 1 plain suffix
    sums. Mask the values first: what is masked must be zero here, or it leaks into every earlier return.

    >>> import torch
    >>> return_to_go(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    tensor([[3., 4., 4.]])
    """
    SHARE.check("gamma", gamma)
    returns_BT = values_BT
    shift = 1
    # Each pass doubles how far ahead a position sees: log2(T) tensor operations instead of T.
    while gamma > 0 and shift < values_BT.shape[1]:
        returns_BT = returns_BT + gamma**shift * _ahead(returns_BT, shift)
        shift *= 2
    return returns_BT


def k_step_return(values_BT: Tensor, steps: int, gamma: float = 1.0) -> Tensor:
    """Sum this value and the next `steps` - 1 with a discount, sum over i = t .. t + steps - 1 of gamma^(i - t) v_i.

    A hard window on `return_to_go`, with its other arguments: one step gives the values themselves, T or more the whole
    return. Source: KETCHUP, arXiv:2504.19024.

    >>> k_step_return(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), 2)
    tensor([[ 3.,  6., 12.,  8.]])
    """
    SHARE.check("gamma", gamma)
    at_least(1).check("steps", steps)
    steps = min(steps, values_BT.shape[1])
    # Windows of 1, 2, 4, ... positions are doubled, and those that `steps` has in binary are laid end to end. A
    # difference of two suffix sums would lose the digits of small values behind large ones.
    returns_BT, covered = torch.zeros_like(values_BT), 0
    window_BT, size = values_BT, 1
    while size <= steps:
        if steps & size:
            returns_BT = returns_BT + gamma**covered * _ahead(window_BT, covered)
            covered += size
        window_BT = window_BT + gamma**size * _ahead(window_BT, size)
        size *= 2
    return returns_BT


def remaining_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Average this and all later counted values, the return-to-go over the number of counted tokens it sums.

    Early positions of long completions no longer have the largest returns. The mean is zero where masked. Source: the
    length normalisation of MiniLLM, arXiv:2306.08543, with the position itself counted.

    >>> remaining_mean(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[True, True, True]]))
    tensor([[3., 4., 6.]])
    """
    values_BT = torch.where(mask_BT, upcast(values_BT), 0.0)
    remaining_BT = mask_BT.flip(1).cumsum(1).flip(1)
    return torch.where(mask_BT, return_to_go(values_BT, 1.0) / remaining_BT.clamp(min=1), 0.0)


def leave_one_out_mean(values: Tensor, groups_B: Tensor) -> Tensor:
    """Average the other rows of each row's group, as a baseline that does not depend on the row itself.

    Values are [B] or [B, T]. Completions of one prompt have one number in `groups_B`; a row alone there gets zero.

    >>> leave_one_out_mean(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([7, 7, 7, 9]))
    tensor([4.0000, 3.5000, 1.5000, 0.0000])
    """
    # float64: the row itself is taken out of a sum that it may dominate.
    wide = values.double()
    _, group_B, sizes_G = groups_B.unique(return_inverse=True, return_counts=True)
    sums_G = wide.new_zeros(len(sizes_G), *wide.shape[1:]).index_add(0, group_B, wide)
    others_B = (sizes_G[group_B] - 1).view(-1, *[1] * (wide.dim() - 1))
    means = torch.where(others_B > 0, (sums_G[group_B] - wide) / others_B.clamp(min=1), 0.0)
    return means.to(upcast(values).dtype)


def _ahead(values_BT: Tensor, shift: int) -> Tensor:
    return pad(values_BT[:, shift:], (0, shift))
