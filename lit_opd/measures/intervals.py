"""Compute means over prompts with their confidence intervals.

Why here: completions of one prompt are not independent, so the unit of every interval is the prompt. An evaluation
calls `over_prompts` and `wilson_over_prompts` for each of its numbers, and `prompt_moments` and `ratio_interval` for
its curves. Everything else that reports a mean with an interval uses the type `Interval`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

CONFIDENCE = 0.95
# How many sums over prompts a ratio's mean and variance are computed from.
MOMENTS = 6


class Interval(NamedTuple):
    """A mean with its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


def prompt_moments(sums: Tensor, weights: Tensor, dim: int = 0) -> Tensor:
    """Sum over prompts whatever the ratio of all values to all weights needs for its mean and its interval.

    Moments of several batches or processes add up to those of all prompts. A weight says how many values (tokens,
    completions) a sum holds; `dim` of the sums counts the prompts.

    Returns:
        [MOMENTS, ...] in float64: weights, squared weights, prompts with a weight, sums, squared sums, sums times
        weights.
    """
    s, n = torch.broadcast_tensors(sums.detach().double(), weights.detach().double())
    return torch.stack([n, n * n, (n > 0).double(), s, s * s, s * n]).sum(dim + 1 if dim >= 0 else dim)


def ratio_interval(moments: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute mean, lower and upper end of the ratio of sums to weights, with Student's t over the prompts.

    With s_i and n_i the sum and the weight of prompt i, the mean is sum s_i / sum n_i. Its variance is that of a ratio
    (delta method; Cochran, Sampling Techniques, 1977, ch. 6): m / (m - 1) x sum (s_i - mean n_i)^2 / (sum n_i)^2 over m
    prompts. The interval has m - 1 degrees of freedom. The moments are those of `prompt_moments`.

    Returns:
        Three arrays [...]: NaN where nothing was counted, unbounded with fewer than two prompts.
    """
    mean, variance = _ratio(moments)
    half = stats.t.ppf(0.5 + confidence / 2, np.maximum(moments[2] - 1, 1)) * np.sqrt(variance)
    return mean, mean - half, mean + half


def _ratio(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, nn, m, s, ss, sn = moments
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = s / n
        variance = np.clip(ss - 2 * mean * sn + mean**2 * nn, 0, None) / n**2 * m / (m - 1)
    # One prompt says nothing of how prompts differ.
    return mean, np.where((m > 1) | np.isnan(mean), variance, np.inf)


def over_prompts(sums: Sequence[float], weights: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Compute a weighted mean with the interval of `ratio_interval`, from the sum of each prompt's values.

    >>> over_prompts([2.0, 4.0], [4.0, 4.0]).mean
    0.75
    """
    ends = ratio_interval(_moments_of(sums, weights), confidence)
    return Interval(*map(float, ends))


def wilson_over_prompts(sums: Sequence[float], weights: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Compute a share with Wilson's interval, which stays inside [0, 1] and is not empty at the ends.

    It is Wilson's on the effective number of prompts, p (1 - p) / variance of the mean p. The sums are shares times the
    weights of the prompts.
    """
    moments = _moments_of(sums, weights)
    mean, variance, prompts = (*map(float, _ratio(moments)), float(moments[2]))
    if math.isnan(mean):
        return Interval(mean, mean, mean)
    n = mean * (1 - mean) / variance if 0 < mean < 1 and 0 < variance < math.inf else prompts
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def _moments_of(sums: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    return prompt_moments(torch.tensor(sums, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)).numpy()


def pass_at_k(correct_G: Tensor, completions_G: Tensor, k: int) -> Tensor:
    """Estimate without bias the chance that at least one of k completions drawn from a prompt's n is correct.

    1 - C(n - c, k) / C(n, k) for c correct of n, in float64 (arXiv:2107.03374, eq. 1). For k = 1 it is the share c / n.

    Raises:
        ValueError: fewer completions than k.

    >>> pass_at_k(torch.tensor([1, 0]), torch.tensor([4, 4]), 2)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if (completions_G < k).any():
        fewest = int(completions_G.min())
        raise ValueError(f"pass@{k} needs at least {k} completions a prompt, found {fewest}")
    pairs = zip(correct_G.tolist(), completions_G.tolist(), strict=True)
    passed = [1 - math.comb(int(n) - int(c), k) / math.comb(int(n), k) for c, n in pairs]
    return torch.tensor(passed, dtype=torch.float64, device=correct_G.device)
