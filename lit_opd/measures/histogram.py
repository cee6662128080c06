"""Count the tokens of an evaluation by their log-ratio, in summable states: exact over batches and processes.

Why here: a few tokens hold most of a reverse KL, and a mean does not show them. `TokenProfile` feeds it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["SCALE", "Histogram", "LogRatioHistogram"]

# Bins of equal width in asinh(x / SCALE): linear within a hundredth of a nat, logarithmic beyond, up to REACH nats.
SCALE, REACH, BINS = 0.01, 100.0, 320


class Histogram(NamedTuple):
    """Numbers of tokens by their log-ratio (student minus teacher, nats).

    Attributes:
        edges: [bins + 1] symmetric about zero, zero among them.
        counts: [bins + 2] tokens: below the edges, in each bin (its lower end included), above the edges.
        totals: [bins + 2] sum of the absolute values of the same tokens.
        least: the smallest value, infinity where there is none.
        largest: the largest.
    """

    edges: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    least: float
    largest: float

    def quantile(self, share: float) -> float:
        """Find the value that a share of the tokens lies below, to within a bin, or NaN where there are none."""
        total = self.counts.sum()
        if not total:
            return math.nan
        # A bin ends where the values do.
        inner = np.clip(self.edges, self.least, self.largest)
        ends, below = np.concatenate([[self.least], inner, [self.largest]]), np.cumsum(self.counts)
        number = min(int(np.searchsorted(below, share * total)), len(self.counts) - 1)
        number = max(number, int(np.flatnonzero(self.counts)[0]))
        inside = (share * total - (below[number] - self.counts[number])) / self.counts[number]
        return float(ends[number] + min(max(inside, 0.0), 1.0) * (ends[number + 1] - ends[number]))

    def top_share(self, share: float = 0.01) -> float:
        """Compute which share of the sum of all |log-ratio| the tokens with the largest hold, or NaN where it is 0.

        Exact but for the one bin of |log-ratio| that is split, whose tokens count alike.
        """
        half = len(self.counts) // 2
        counts, totals = (x[half:][::-1] + x[:half] for x in (self.counts, self.totals))
        wanted = share * counts.sum()
        before = np.cumsum(counts) - counts
        taken = np.clip((wanted - before) / np.maximum(counts, 1), 0, 1)
        return float((taken * totals).sum() / totals.sum()) if totals.sum() > 0 else math.nan


class LogRatioHistogram(Metric):
    """Counts tokens by their log-ratio in fixed bins: linear near zero, logarithmic further out."""

    full_state_update = False
    counts: Tensor
    totals: Tensor
    least: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Whole numbers, and sums made in float64: under bf16-true Lightning casts a module's states to bf16.
        self.add_state("counts", torch.zeros(BINS + 2, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(BINS + 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("least", torch.tensor(math.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("largest", torch.tensor(-math.inf, dtype=torch.float64), dist_reduce_fx="max")

    @staticmethod
    def edges() -> np.ndarray:
        """Place the ends of the bins, [bins + 1] nats, of which the middle one is exactly zero."""
        positive = SCALE * np.sinh(np.linspace(0, np.arcsinh(REACH / SCALE), BINS // 2 + 1))
        return np.concatenate([-positive[:0:-1], positive])

    def update(self, log_ratio_N: Tensor) -> None:
        """Add tokens by their log-ratios, in nats."""
        values = log_ratio_N.detach().double()
        edges = torch.from_numpy(self.edges()).to(values.device)
        bins = torch.bucketize(values, edges, right=True)
        self.counts = self.counts + torch.bincount(bins, minlength=BINS + 2)
        # Not `bincount` with weights, which CUDA refuses under trainer.deterministic.
        self.totals = self.totals + values.new_zeros(BINS + 2).index_add(0, bins, values.abs())
        if len(values):
            self.least = torch.minimum(self.least, values.min())
            self.largest = torch.maximum(self.largest, values.max())

    def compute(self) -> Histogram:
        """Read the histogram of all tokens so far."""
        counts, totals = self.counts.cpu().numpy(), self.totals.double().cpu().numpy()
        return Histogram(self.edges(), counts, totals, float(self.least), float(self.largest))
