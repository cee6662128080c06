"""Average values over seeds and prompts, with an interval and a p-value that answer for both.

Every run of a variant is measured on the same prompts, and runs of one seed share their training prompts and uniform
numbers. So two variants are compared by their differences at each seed and prompt, and an interval has to answer for
both: another seed would have trained another student, other prompts would have been easier or harder. `standings` calls
this for every pair of variants.

A value is taken as the sum of the mean, an effect of its seed, one of its prompt, and a rest. The variance of the
average is then that of drawing S seeds (the rest included) plus that of drawing P prompts, each estimated, the first
with few degrees of freedom. The half width is sqrt(t²(S - 1) V_seeds + t²(P - 1) V_prompts), t the quantile of Student
at the level: Banerjee (Sankhya 22, 1960). Were the two variances estimated apart, its coverage would be at least the
level for any shares of the two: the distribution function F of a chi-square variable with one degree of freedom is
concave, so with shares w_i and W_i the estimated over the true variances, E F(sum w_i t_i² W_i) >= sum w_i
E F(t_i² W_i), and each of these is the level. Resampling three to five seeds instead would give intervals far too
short. With one seed, or one prompt, one of the two parts is left, and this is Student's interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

__all__ = ["Mean", "holm", "interval_of", "mean_of", "p_value"]

Array = NDArray[np.float64]

CONFIDENCE = 0.95
SMALLEST_P = 1e-15


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and prompts, every one of them counted once, with its interval.

    The interval holds for other seeds where there are several, and for other prompts where there are several. It is
    None of a single value, and of one prompt on which every seed has the same.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    prompts: int


def mean_of(values_SP: ArrayLike) -> Mean:
    """Average values [seeds, prompts], with the interval that they allow."""
    values = np.asarray(values_SP, dtype=np.float64)
    low, high = (None, None) if _is_untestable(values) else map(float, interval_of(values))
    return Mean(float(values.mean()), low, high, *values.shape)


def interval_of(values_SP: ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """Find both ends [...] of the interval of a mean of values [..., seeds, prompts], for other seeds and prompts.

    It is never narrower than Student's interval from the prompts' means over these very seeds: values that are 0 or 1
    often give two seeds the same mean, whose spread of zero would tell nothing of what other seeds do.
    """
    values = np.asarray(values_SP, dtype=np.float64)
    mean, half = values.mean((-2, -1)), _half_width(1 - confidence, values.shape[-2:], _variances(values))
    return mean - half, mean + half


def p_value(differences_SP: ArrayLike) -> float:
    """Find the level, at least 1e-15, at which the interval of differences [seeds, prompts] begins to hold zero.

    It is at least the chance of such a mean where there is no difference, and never below 2^(1 - n), where n prompts
    differ: so often n fair coins fall on one side. Values that are 0 or 1 may differ on few prompts, all to one side,
    whose spread would then make too sure. It is 1 where every difference is zero, or nothing can be tested.
    """
    differences = np.asarray(differences_SP, dtype=np.float64)
    mean, shape = abs(float(differences.mean())), differences.shape
    if mean == 0 or _is_untestable(differences):
        return 1.0
    variances = _variances(differences)
    coins = 2.0 ** (1 - np.count_nonzero(differences.mean(0))) if shape[1] > 1 else 0.0

    def excess(log_alpha: float) -> float:
        return float(_half_width(math.exp(log_alpha), shape, variances) - mean)

    lowest = math.log(SMALLEST_P)
    # At level 1 the half width is 0, so there is a root unless even the widest interval leaves zero out.
    p = SMALLEST_P if excess(lowest) < 0 else math.exp(optimize.brentq(excess, lowest, 0.0))
    return min(1.0, max(p, coins))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: the chance of any false difference among them stays at the level (Holm, 1979).

    >>> holm([0.5, 0.01, 0.25])
    [0.5, 0.03, 0.5]
    """
    n, order = len(p_values), np.argsort(p_values, kind="stable")
    steps = np.minimum(np.maximum.accumulate([(n - i) * p_values[k] for i, k in enumerate(order)]), 1.0)
    return [float(steps[place]) for place in np.argsort(order)]


def _is_untestable(values: Array) -> bool:
    """Find a single value, or one prompt on which every seed has the same value, which is not zero."""
    return values.size == 1 or (values.shape[1] == 1 and bool(values.any()) and np.ptp(values) == 0)


def _variances(values_SP: Array) -> tuple[Array, Array, Array]:
    """Estimate variances of the mean: from drawing seeds, from drawing prompts, and from prompts at these seeds."""
    seeds, prompts = values_SP.shape[-2:]
    by_seed, by_prompt = values_SP.mean(-1), values_SP.mean(-2)
    from_seeds = by_seed.var(-1, ddof=1) / seeds if seeds > 1 else np.zeros_like(by_seed[..., 0])
    if prompts == 1:
        return from_seeds, np.zeros_like(from_seeds), np.zeros_like(from_seeds)
    of_prompts = by_prompt.var(-1, ddof=1)
    if seeds == 1:
        return from_seeds, of_prompts / prompts, of_prompts / prompts
    rest = values_SP - by_seed[..., None] - by_prompt[..., None, :] + values_SP.mean((-2, -1), keepdims=True)
    rest_variance = (rest**2).sum((-2, -1)) / ((seeds - 1) * (prompts - 1))
    # The variance of the prompts' means holds a share of the rest, which the seeds' part has counted already.
    return from_seeds, (of_prompts - rest_variance / seeds).clip(0) / prompts, of_prompts / prompts


def _half_width(alpha: float, shape: tuple[int, ...], variances: tuple[Array, Array, Array]) -> Array:
    # Student's t with no degree of freedom is not a number, and its part of the variance is zero.
    t_seeds, t_prompts = (special.stdtrit(n - 1, alpha / 2) ** 2 if n > 1 else 0.0 for n in shape)
    from_seeds, from_prompts, at_these_seeds = variances
    return np.sqrt(np.maximum(t_seeds * from_seeds + t_prompts * from_prompts, t_prompts * at_these_seeds))
