"""Means over prompts with their confidence intervals, as torchmetrics with summable states.

Exact over batches and processes. An evaluation and `measure` report their numbers as an `Interval`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torchmetrics import Metric

__all__ = ["AvgAtK", "Interval", "PassAtK", "PromptMean"]


class Interval(NamedTuple):
    """A mean with its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


class PromptMean(Metric):
    """A weighted mean whose interval takes the prompt as the unit: completions of one prompt are not independent.

    With s_i the sum of values and n_i the sum of weights of prompt i, the mean is sum s_i / sum n_i. Its variance is
    that of a ratio (delta method; Cochran, Sampling Techniques, 1977, ch. 6): m / (m - 1) x sum (s_i - mean n_i)^2 /
    (sum n_i)^2 over m prompts. The interval is Student's t with m - 1 degrees of freedom.

    Args:
        confidence: level of the interval.
    """

    full_state_update = False
    s: Tensor
    n: Tensor
    ss: Tensor
    sn: Tensor
    nn: Tensor
    prompts: Tensor

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__()
        self.confidence = confidence
        for name in ("s", "n", "ss", "sn", "nn", "prompts"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, weights: Tensor) -> None:
        """Add prompts.

        Args:
            sums: [prompts] sum of the values of each prompt.
            weights: [prompts] how many values (tokens, completions) each sum holds.
        """
        sums, weights = self.summands(sums, weights)
        # Not in place: a state made in inference mode may not be changed outside it.
        self.s = self.s + sums.sum()
        self.n = self.n + weights.sum()
        self.ss = self.ss + (sums * sums).sum()
        self.sn = self.sn + (sums * weights).sum()
        self.nn = self.nn + (weights * weights).sum()
        self.prompts = self.prompts + len(sums)

    def summands(self, sums: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What each prompt adds to numerator and denominator of the mean, for the arguments of `update`."""
        return sums.detach().double(), weights.detach().double()

    def compute(self) -> Interval:
        """Mean and confidence interval: NaN where nothing was counted, unbounded with fewer than two prompts."""
        if self.n == 0:
            return Interval(math.nan, math.nan, math.nan)
        return self._interval((self.s / self.n).item(), self._variance(), int(self.prompts))

    def _variance(self) -> float:
        mean, m = self.s / self.n, self.prompts
        squares = (self.ss - 2 * mean * self.sn + mean**2 * self.nn).clamp(min=0)
        return (squares / self.n**2 * m / (m - 1)).item() if m > 1 else math.inf

    def _interval(self, mean: float, variance: float, prompts: int) -> Interval:
        if prompts < 2:
            return Interval(mean, -math.inf, math.inf)
        half = float(stats.t.ppf(0.5 + self.confidence / 2, prompts - 1)) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half)


class PassAtK(PromptMean):
    """Unbiased pass@k: the chance that at least one of k completions drawn from a prompt's n is correct.

    1 - C(n - c, k) / C(n, k) for c correct of n (arXiv:2107.03374, eq. 1), averaged over prompts. The interval is
    Wilson's on the effective number of prompts p (1 - p) / variance of the mean, so that it stays inside [0, 1] and is
    not empty at the ends.

    Args:
        k: completions drawn.
        confidence: level of the interval.
    """

    def __init__(self, k: int = 1, confidence: float = 0.95) -> None:
        super().__init__(confidence)
        self.k = k

    def summands(self, sums: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each prompt's pass@k, with weight 1.

        Args:
            sums: [prompts] how many completions are correct.
            weights: [prompts] how many there are, at least k.

        Raises:
            ValueError: fewer completions than k.
        """
        if (weights < self.k).any():
            fewest = int(weights.min())
            raise ValueError(f"pass@{self.k} needs at least {self.k} completions a prompt, found {fewest}")
        pairs = zip(sums.tolist(), weights.tolist(), strict=True)
        passed = [1 - math.comb(int(n) - int(c), self.k) / math.comb(int(n), self.k) for c, n in pairs]
        values = torch.tensor(passed, dtype=torch.float64, device=self.s.device)
        return values, torch.ones_like(values)

    def _interval(self, mean: float, variance: float, prompts: int) -> Interval:
        n = mean * (1 - mean) / variance if 0 < mean < 1 and 0 < variance < math.inf else prompts
        z = float(stats.norm.ppf(0.5 + self.confidence / 2))
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


class AvgAtK(PassAtK):
    """avg@k: the mean accuracy over all k completions of every prompt; it equals pass@1."""

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__(1, confidence)
