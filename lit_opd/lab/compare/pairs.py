"""Many pairs at once: p-values corrected for their number, and the groups within which nothing can be told apart."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["holm", "letters"]


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: the chance of any false difference among them stays at the level (Holm, 1979).

    Args:
        p_values: of all comparisons.

    Returns:
        The corrected ones, in the same order: below the level exactly where the difference holds.
    """
    if not p_values:
        return []
    n, order = len(p_values), np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate([(n - i) * p_values[k] for i, k in enumerate(order)])
    corrected = np.empty(n)
    corrected[order] = np.minimum(steps, 1.0)
    return [float(p) for p in corrected]


def letters(different: ArrayLike) -> list[str]:
    """Compact letter display: two variants share a letter exactly where they are not distinguishable.

    By insertion and absorption (Piepho, Journal of Computational and Graphical Statistics 13, 2004).

    Args:
        different: [n, n] symmetric, True where two are distinguishable; the variants from best to worst.

    Returns:
        For each variant its letters, e.g. "a", "a b", "b".
    """
    apart = np.asarray(different, dtype=bool)
    n = len(apart)
    groups = [frozenset(range(n))]
    for i in range(n):
        for j in range(i + 1, n):
            if apart[i, j]:
                split = [part for group in groups for part in _split(group, i, j)]
                groups = [group for group in dict.fromkeys(split) if not any(group < other for other in split)]
    groups.sort(key=sorted)
    return [" ".join(_letter(k) for k, group in enumerate(groups) if i in group) for i in range(n)]


def _split(group: frozenset[int], i: int, j: int) -> tuple[frozenset[int], ...]:
    return (group - {i}, group - {j}) if {i, j} <= group else (group,)


def _letter(index: int) -> str:
    turn, place = divmod(index, 26)
    return string.ascii_lowercase[place] + (str(turn) if turn else "")
