"""Count over all processes of a run.

Why here: under data parallelism a loss needs the tokens of the whole step, and Lightning's own averages would weigh
every process alike. The module is an `AcrossProcesses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy

__all__ = ["AcrossProcesses"]

T = TypeVar("T")


class AcrossProcesses(L.LightningModule):
    """A Lightning module that counts over all processes."""

    def total(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Sum values over all processes, in one exchange."""
        stacked = torch.stack([torch.as_tensor(v, device=self.device).float() for v in values.values()])
        reduced = self.trainer.strategy.reduce(stacked, reduce_op="sum")
        return dict(zip(values, reduced.tolist(), strict=True))

    def gathered(self, own: list[T]) -> list[T]:
        """Put together what every process has, one process after the other."""
        if self.trainer.world_size == 1:
            return own
        parts: list[list[T]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(parts, own)
        return [one for part in parts for one in part]

    def gradients_kept_local(self, local: bool) -> AbstractContextManager[None]:
        """Keep backward passes inside from exchanging gradients, which the last micro-batch does for all."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if local and isinstance(strategy, ParallelStrategy) else nullcontext()
