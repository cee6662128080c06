"""Merge tokens that mean the same into one symbol, as endings of two models may.

A group of tokens keeps its first member, which gets the probability of all: the law of what is compared is the image of
the model's law under the merging. The objective merges what estimators see, scorers what they report of single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Groups", "merge_ids", "merge_logps"]

Groups = Sequence[Sequence[int]]


def merge_ids(ids: Tensor, groups: Groups) -> Tensor:
    """Replace every member of a group by its first.

    >>> merge_ids(torch.tensor([3, 1, 2]), [[1, 3]])
    tensor([1, 1, 2])
    """
    for first, *others in groups:
        ids = torch.where(torch.isin(ids, ids.new_tensor(others)), first, ids)
    return ids


def merge_logps(logps_V: Tensor, groups: Groups) -> Tensor:
    """Give the first member of every group the probability of all, and the others none.

    Logits are merged alike: their softmax is the merged softmax.

    Args:
        logps_V: [..., V] log-probabilities or logits.
        groups: ids, of which none stands twice.

    >>> merge_logps(torch.tensor([0.5, 0.2, 0.3]).log(), [[0, 2]]).exp()
    tensor([0.8000, 0.2000, 0.0000])
    """
    for group in groups:
        members = torch.tensor(group, device=logps_V.device)
        together = logps_V.index_select(-1, members).logsumexp(-1, keepdim=True)
        nothing = torch.full_like(together, -torch.inf).expand(*together.shape[:-1], len(group) - 1)
        logps_V = logps_V.index_copy(-1, members, torch.cat([together, nothing], dim=-1))
    return logps_V
