"""Estimate moments from gradients of independent units, with intervals, for `experiment`.

A unit is a few prompts with all their completions; its gradients under several estimators are of the same completions.
All of it are functions of expectations: the squared norm of an expected gradient, the inner product of two, a trace of
a covariance. The square of a mean counts noise as signal. Sums over pairs of *different* units do not, because their
gradients are independent: every estimate here is such a sum (a U-statistic), and so unbiased, but for ratios.

Intervals are the jackknife's with Student's t, for 95% of the truth where units are not too few: on tabular models with
64 units of 16 prompts they hold 93 to 98%, but 87 to 93% for a bias at the very edge of what can be told from zero.
Where the linear part of a U-statistic vanishes, as that of a bias of zero does, the jackknife's variance is too large,
never too small (Efron and Stein, Annals of Statistics 9, 1981).

Shapes: n units, P coordinates of a gradient, all of them or those of a sketch. Arithmetic in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from lit_opd.measures.intervals import Interval

__all__ = ["FEWEST", "ITSELF", "UNKNOWN", "Estimate", "Moments", "compare", "inner_product", "trace_variance"]

FEWEST = 4  # units: a trace variance without one unit needs three


@dataclass(frozen=True)
class Estimate:
    """A number estimated from all units, and again without each of them."""

    value: Tensor
    without_n: Tensor  # [n] without unit i

    def map(self, function: Callable[..., Tensor], *others: Estimate) -> Estimate:
        """Apply a function to this and other estimates of the same units."""
        return Estimate(
            function(self.value, *(other.value for other in others)),
            function(self.without_n, *(other.without_n for other in others)),
        )

    def interval(self, confidence: float = 0.95) -> Interval:
        """Give the estimate with its jackknife interval."""
        n = len(self.without_n)
        error = ((self.without_n - self.without_n.mean()).square().sum() * (n - 1) / n).sqrt()
        half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error.item()
        return Interval(self.value.item(), self.value.item() - half, self.value.item() + half)

    def positive(self, confidence: float = 0.95) -> Interval:
        """Give the interval of a number that cannot be negative.

        Where it is clearly positive, such a number is skewed, and the interval also holds the jackknife's on the scale
        of logarithms.
        """
        plain = self.interval(confidence)
        if plain.low <= 0 or (self.without_n <= 0).any():
            return plain
        _, low, high = self.map(torch.log).interval(confidence)
        return Interval(plain.mean, min(plain.low, math.exp(low)), max(plain.high, math.exp(high)))


def inner_product(a_nP: Tensor, b_nP: Tensor) -> Estimate:
    """Estimate the inner product of the expectations of two gradients, from all pairs of different units."""
    n, own_n = len(a_nP), (a_nP * b_nP).sum(1)
    a_P, b_P = a_nP.sum(0), b_nP.sum(0)
    total = a_P @ b_P - own_n.sum()
    without_n = total - a_nP @ b_P - b_nP @ a_P + 2 * own_n
    return Estimate(total / (n * (n - 1)), without_n / ((n - 1) * (n - 2)))


def trace_variance(a_nP: Tensor) -> Estimate:
    """Estimate the trace of the covariance of one unit's gradient."""
    n, squares_n, sum_P = len(a_nP), a_nP.square().sum(1), a_nP.sum(0)
    whole, rest_n = squares_n.sum(), squares_n.sum() - squares_n
    others_n = sum_P @ sum_P - 2 * (a_nP @ sum_P) + squares_n
    return Estimate(
        (whole - sum_P @ sum_P / n) / (n - 1),
        (rest_n - others_n / (n - 1)) / (n - 2),
    )


@dataclass(frozen=True)
class Moments:
    """An estimator's gradients beside those of a target."""

    squared_bias: Interval  # squared norm of the difference of expectations, over that of the target's
    cosine: Interval  # between the two expectations

    @property
    def relative_bias(self) -> Interval:
        """Norm of the difference over that of the target: the root of `squared_bias`, zero where that is below."""
        return Interval(*(math.sqrt(max(value, 0.0)) if value == value else math.nan for value in self.squared_bias))


# Against a target of which nothing is known, and against its own gradients, whatever is known of them.
UNKNOWN = Moments(*[Interval(math.nan, math.nan, math.nan)] * 2)
ITSELF = Moments(squared_bias=Interval(0.0, 0.0, 0.0), cosine=Interval(1.0, 1.0, 1.0))


def compare(a_nP: Tensor, target_nP: Tensor) -> Moments:
    """Estimate bias and direction of an estimator against a target, from gradients of at least four units.

    Ratios to a norm that cannot be told from zero mean nothing and are NaN: both where it is the target's, the cosine
    where it is the estimator's own. The target's own gradients have no bias, however many units there are.
    """
    if len(a_nP) < FEWEST:
        raise ValueError(f"moments need at least {FEWEST} units, found {len(a_nP)}")
    if torch.equal(a_nP, target_nP):
        return ITSELF
    a_nP, target_nP = a_nP.double(), target_nP.double()
    target = inner_product(target_nP, target_nP)
    if target.interval().low <= 0:
        return UNKNOWN
    difference = inner_product(a_nP - target_nP, a_nP - target_nP)
    own, bias = inner_product(a_nP, a_nP), difference.map(torch.div, target).positive()
    if own.interval().low <= 0:
        return Moments(bias, UNKNOWN.cosine)
    apart = inner_product(a_nP, target_nP).map(lambda ab, aa, bb: 1 - ab / (aa * bb).sqrt(), own, target)
    mean, low, high = apart.positive()
    return Moments(bias, Interval(*(min(1.0, max(-1.0, 1 - value)) for value in (mean, high, low))))
