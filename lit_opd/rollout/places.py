"""Keep where every row of a decoder stands, on the device, in tensors that stay where they are.

Prompts end at the same column of the cache, so that all rows write the same column. Columns before the beginning of a
shorter prompt are masked, and so are those that nothing was written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.rollout.token_parts import Column, Seen

__all__ = ["Places"]


class Places:
    """The places of so many rows at most, over so many columns.

    Attributes:
        bias_RM: 0 at columns that a row may look at, minus infinity elsewhere.
        place_R: the position of the next token of each row in its sequence.
        first_R: the column where the prompt of each row begins.
        column_1: the next column, the same for all rows.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.bias_RM = torch.zeros(rows, width, dtype=dtype, device=device)
        self.place_R, self.first_R = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)

    def begin(self, lengths_B: Tensor, width: int) -> None:
        """Let rows look at their prompts of these lengths, which end before column `width`."""
        rows = len(lengths_B)
        self.place_R[:rows], self.first_R[:rows] = lengths_B, width - lengths_B
        columns_M = torch.arange(self.bias_RM.shape[1], device=lengths_B.device)
        seen_BM = (columns_M < width) & (columns_M >= width - lengths_B[:, None])
        self.bias_RM[:rows] = torch.zeros_like(self.bias_RM[:rows]).masked_fill_(~seen_BM, -torch.inf)
        self.column_1.fill_(width)

    def open(self, rows: int, width: int, column: Column) -> Seen:
        """Let the first rows look at a column too, and say what they see of the first `width`."""
        bias_BM = self.bias_RM[:rows, :width]
        if isinstance(column, int):
            bias_BM[:, column] = 0.0
        else:
            bias_BM.index_fill_(1, column, 0.0)
        return Seen(self.first_R[:rows], column, bias_BM)

    def advance(self, rows: int) -> None:
        """Move the first rows on by a token."""
        self.column_1.add_(1)
        self.place_R[:rows].add_(1)

    def select(self, index: Tensor) -> None:
        """Put the chosen rows first, in place."""
        for held in (self.bias_RM, self.place_R, self.first_R):
            held[: len(index)] = held[index]
