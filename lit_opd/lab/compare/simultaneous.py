"""Correct tests and intervals for how many contrasts are asked, by the joint distribution of their t statistics.

`analysis` calls this. Two families are known: contrasts of the best of k means with each other one, whose largest is
the studentized range (the best is chosen after looking, so no smaller bound holds), and contrasts of n means with one
baseline that was named before (Dunnett, JASA 50, 1955).

Both go in steps: the contrast that is farthest out answers for the whole family, the next for one that is smaller by
one, and the first that cannot be told apart ends the steps (Marcus, Peritz and Gabriel, Biometrika 63, 1976). Where all
are equal this is the test of one step. Where some differ it finds more, and the chance that any finding is false stays
at the level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial.legendre import leggauss
from scipy import optimize, special

__all__ = [
    "LEVEL",
    "Statistic",
    "Verdict",
    "baseline_tail",
    "critical",
    "range_tail",
    "shifted_tail",
    "step_down",
    "t_tail",
]

LEVEL = 0.05
OUTSIDE = 1e-14  # of the distribution of the estimated error, at either end

Tail = Callable[[float, int, float], float]
"""(t, size of the family, degrees of freedom) -> the chance that the largest |t| of the family is at least t."""


@dataclass(frozen=True)
class Statistic:
    """A contrast over its standard error, and the degrees of freedom of the error."""

    t: float  # at least 0
    df: float


@dataclass(frozen=True)
class Verdict:
    """The verdict on one contrast of a family."""

    p: float  # corrected
    critical: float  # half the width of its interval, in standard errors

    @property
    def told(self) -> bool:
        """True where zero lies outside of the interval, which is where `p` is below the level."""
        return self.p < LEVEL


def step_down(statistics: Sequence[Statistic], tail: Tail, smallest: int) -> list[Verdict]:
    """Judge contrasts in steps, from the farthest out to the nearest.

    Args:
        statistics: one a contrast.
        tail: of the family.
        smallest: the size of a family of one contrast, which is 2 means for `range_tail` and 1 for `baseline_tail`.
    """
    whole = len(statistics) + smallest - 1
    alone = [tail(one.t, whole, one.df) for one in statistics]
    found: dict[int, Verdict] = {}
    p, size = 0.0, whole
    for place in sorted(range(len(statistics)), key=alone.__getitem__):
        one = statistics[place]
        p = max(p, tail(one.t, size, one.df))
        width = critical(tail, size, one.df)
        # After a contrast that cannot be told apart no other is: its interval reaches zero at least.
        found[place] = Verdict(p, width if p < LEVEL else max(width, one.t))
        size -= p < LEVEL
    return [found[place] for place in range(len(statistics))]


def t_tail(t: float, size: int, df: float) -> float:
    """Find the chance of a |t| at least so large, of a contrast that stands alone, whatever the size."""
    return float(2 * special.stdtr(df, -t))


def range_tail(t: float, means: int, df: float) -> float:
    """Find the chance that the two of k equal means that lie farthest apart give a |t| at least so large.

    It is that of a studentized range of t times the root of 2: P(R < w) = k times the integral over z of
    phi(z) (Phi(z) - Phi(z - w))^(k - 1), averaged over the distribution of the estimated error.

    >>> round(range_tail(2.0, 2, 8.0), 6) == round(t_tail(2.0, 2, 8.0), 6)
    True
    """
    nodes, weights = _normal()
    width = np.sqrt(2) * t * _errors(df)[0][:, None]
    inside = special.ndtr(nodes) - special.ndtr(nodes - width)
    return _averaged(means * (inside ** (means - 1) @ weights), df)


def baseline_tail(t: float, contrasts: int, df: float) -> float:
    """Find the chance that n means that equal a baseline give a largest |t| at least so large.

    It is Dunnett's with the correlation of one half that equal standard errors give.

    >>> round(baseline_tail(2.0, 1, 8.0), 6) == round(t_tail(2.0, 1, 8.0), 6)
    True
    """
    nodes, weights = _normal()
    half = np.sqrt(2) * t * _errors(df)[0][:, None]
    inside = special.ndtr(nodes + half) - special.ndtr(nodes - half)
    return _averaged(inside**contrasts @ weights, df)


@lru_cache(maxsize=4096)
def critical(tail: Tail, size: int, df: float) -> float:
    """Find the |t| that the largest of a family exceeds at the level."""
    return float(optimize.brentq(lambda t: tail(t, size, df) - LEVEL, 0.0, 1e4, xtol=1e-7))


def shifted_tail(t: float, shift: float, df: float) -> float:
    """Find the chance of a |t| at least so large, of a difference that is so many standard errors.

    >>> round(shifted_tail(2.0, 0.0, 8.0), 6) == round(t_tail(2.0, 1, 8.0), 6)
    True
    """
    errors, weights = _errors(df)
    return float((special.ndtr(shift - t * errors) + special.ndtr(-shift - t * errors)) @ weights)


def _averaged(inside: np.ndarray, df: float) -> float:
    """Average the chance to lie outside over the estimated error."""
    return float(np.clip((1 - inside) @ _errors(df)[1], 0.0, 1.0))


@lru_cache(maxsize=1)
def _normal() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of an integral over a standard normal variable."""
    nodes, weights = leggauss(64)
    z = 8.0 * nodes
    return z, 8.0 * weights * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


@lru_cache(maxsize=4096)
def _errors(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of an average over the estimated error in units of the true one: a chi over sqrt(df)."""
    nodes, weights = leggauss(48)
    low, high = np.sqrt(special.chdtri(df, [1 - OUTSIDE, OUTSIDE]) / df)
    s = low + (high - low) * (1 + nodes) / 2
    log_density = (
        df * np.log(s) - df * s**2 / 2 - np.log(s) + np.log(2) + df / 2 * np.log(df / 2) - special.gammaln(df / 2)
    )
    shares = np.exp(log_density) * weights
    return s, shares / shares.sum()
