"""What a report always says, and numbers as it writes them: with as many digits as are known."""

from __future__ import annotations

import math

from lit_opd.lab.compare.statistics import Mean

__all__ = ["CROSSED", "EXPLANATIONS", "ONE_SEED", "amount", "interval", "probability"]

PAIRED = """
Differences are paired: at the same seed, which means the same training prompts and uniform numbers, and on the same
validation prompt.
"""
UNITS = """
Every validation prompt counts once. Curves, and values at equal cost, count every token once, so that both may differ
where long completions differ from short ones.
"""
CROSSED = """
Intervals and p speak of other seeds and other prompts: Student's t for both, joined so that they rather cover too much,
and never narrower than for other prompts alone. `these runs` is the bootstrap over prompts alone: how these very
students differ.
"""
ONE_SEED = "Where a pair shares one seed only, its interval is of prompts only: it says nothing about other seeds."
CORRECTED = """
p is corrected for the number of pairs on that yardstick (Holm), not for the number of yardsticks: choose one before
looking. Not distinguishable does not mean equal: the interval says how large a difference may be.
"""
LETTERS = "Variants that share a letter are not distinguishable from each other."
AT_EQUAL_COST = """
Values at equal cost have the seed as their unit and speak of these prompts only. They are read off between evaluations,
never beyond them.
"""
FRONT = "A variant is on the front if none is at least as good at no more cost, by the means, whatever their intervals."
EXPLANATIONS = (PAIRED, UNITS, CROSSED, ONE_SEED, CORRECTED, LETTERS, AT_EQUAL_COST, FRONT)


def interval(mean: Mean) -> str:
    """The mean and its interval, to two digits of the interval's width, e.g. `0.123 [0.100, 0.146]`."""
    if mean.low is None or mean.high is None:
        return f"{mean.mean:.4g}"
    width = mean.high - mean.low
    # Adding zero turns a minus zero into a plain one.
    if not width > 0:
        return f"{mean.mean + 0.0:.4g} [{mean.low + 0.0:.4g}, {mean.high + 0.0:.4g}]"
    decimals = min(12, max(0, 1 - math.floor(math.log10(width))))
    centre, low, high = (round(value, decimals) + 0.0 for value in (mean.mean, mean.low, mean.high))
    return f"{centre:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def probability(p: float) -> str:
    """A p-value, e.g. `0.032`, `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float | None) -> str:
    """A cost, e.g. `12,345` or `0.482`; empty where it was not recorded."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
