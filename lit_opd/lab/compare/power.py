"""Say before a comparison is made what so many seeds can tell.

The command `compare --plan` calls this, and docs/statistics.md shows the table for other numbers of variants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import optimize

from lit_opd.lab.compare.simultaneous import critical, range_tail, shifted_tail

__all__ = ["Sight", "power_of", "smallest_difference"]


@dataclass(frozen=True)
class Sight:
    """What a number of seeds can tell."""

    seeds: int
    half: float  # the difference that half of all comparisons would find, in standard deviations between seeds
    nine_in_ten: float


def power_of(difference: float, variants: int, seeds: int) -> float:
    """Find the chance to tell a variant from the best, in the first and hardest step of the test.

    Args:
        difference: between their means, in standard deviations between the seeds of a variant, when the effect that a
            seed has on all variants is taken off.
        variants: that are compared.
        seeds: of each, the same for all.

    Returns:
        The chance that a difference over its estimated error, whose distribution is a noncentral t, exceeds what the
        largest of all differences would have to; 0 with one seed, which leaves no error to tell it from.
    """
    df = (variants - 1) * (seeds - 1)
    if df < 1:
        return 0.0
    threshold, shift = critical(range_tail, variants, float(df)), difference / math.sqrt(2 / seeds)
    return shifted_tail(threshold, shift, float(df))


def smallest_difference(variants: int, seeds: int) -> Sight:
    """Find the differences that half of all comparisons, and nine in ten, would find.

    >>> smallest_difference(5, 3).nine_in_ten < smallest_difference(2, 3).nine_in_ten
    True
    """
    found = [
        optimize.brentq(lambda d, chance=chance: power_of(d, variants, seeds) - chance, 0.0, 1e4)
        if seeds > 1
        else math.inf
        for chance in (0.5, 0.9)
    ]
    return Sight(seeds, *found)
