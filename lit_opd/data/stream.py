"""Pick the rows of every training batch, and load picked rows as batches.

Why here: the picks are a function of the seed alone, whatever the processes and interruptions. The data module makes a
`PromptStream` for training, and gives Lightning a `PromptLoader`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lit_opd.data.prompts import EncodedPrompts, pad_left
from lit_opd.errors import UserError
from lit_opd.types import PromptBatch, Prompts

__all__ = ["Pick", "PromptLoader", "PromptStream"]

# A row's index in the data set, and the two integers that name its random draws.
Pick = tuple[int, tuple[int, int]]


class PromptStream:
    """The endless sequence of training batches, a pure function of the seed, of which each rank takes its share.

    Epoch e goes through a permutation drawn from (seed, e). Batch `number`, counted over the whole run, takes the next
    `batch_size` rows of it; the incomplete rest of an epoch is dropped. Rank r of W takes rows r, r + W, ... of each
    batch, so what a step sees does not depend on W. One pass of `iter` gives one epoch's worth of batches, from
    where the last pass stopped.

    Args:
        size: number of rows.
        batch_size: rows of a batch over all ranks.
        seed: of the order.
        rank: this process.
        world_size: number of processes, W.
        position: number of the first batch to give.

    Raises:
        UserError: fewer rows than a batch takes, or fewer rows in a batch than ranks.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, position: int = 0
    ) -> None:
        if size < batch_size:
            remedy = "Lower it or add prompts."
            raise UserError("data.batch_size", f"at most the {size} training prompts there are", batch_size, remedy)
        if batch_size < world_size:
            found, remedy = batch_size, "Raise it or use fewer processes."
            raise UserError("data.batch_size", f"at least one prompt for each of {world_size} processes", found, remedy)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position
        self._epoch_order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[Pick]]:
        for _ in range(len(self)):
            self.position += 1
            yield self.batch(self.position - 1)

    def batch(self, number: int) -> list[Pick]:
        """Pick this rank's rows of a batch. The second integer of a draw is the row's place in the whole batch."""
        epoch, place = divmod(number, len(self))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self._permutation(epoch))
        rows = self._epoch_order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return [(rows[i], (number, i)) for i in range(self.rank, self.batch_size, self.world_size)]

    def _permutation(self, epoch: int) -> list[int]:
        # Hashed, because with seed + epoch the second epoch of seed 0 would be the first of seed 1.
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(self.size, generator=generator).tolist()


class PromptLoader:
    """Prompt batches for picks of rows.

    Not a torch DataLoader: in distributed runs Lightning would rebuild one around its own sampler, which repeats rows.
    """

    def __init__(self, prompts: EncodedPrompts, picks: PromptStream | list[list[Pick]], pad_id: int) -> None:
        self.prompts, self.picks, self.pad_id = prompts, picks, pad_id

    def __len__(self) -> int:
        return len(self.picks)

    def __iter__(self) -> Iterator[PromptBatch]:
        for picks in self.picks:
            ids_BP, mask_BP = pad_left([self.prompts.ids[row] for row, _ in picks], self.pad_id)
            rows: list[Mapping[str, Any]] = [self.prompts.rows[row] for row, _ in picks]
            places = [place for _, (_, place) in picks]
            shown = {
                name: Prompts(*pad_left([ids[row] for row, _ in picks], self.pad_id))
                for name, ids in self.prompts.shown.items()
            }
            routes = self.prompts.routes
            routes_BM = None if routes is None else torch.tensor([routes[row] for row, _ in picks], dtype=torch.float32)
            yield PromptBatch(Prompts(ids_BP, mask_BP), rows, picks[0][1][0], places, shown, routes_BM)

    # These two only tell Lightning that training can be resumed within an epoch. The position is not theirs to keep:
    # Lightning does not hand it back after an epoch's end, and a batch given is not yet a batch trained on.
    def state_dict(self) -> dict[str, Any]:
        """Save nothing: see `PromptDataModule.completed_batches`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load nothing: see `PromptDataModule.completed_batches`."""
