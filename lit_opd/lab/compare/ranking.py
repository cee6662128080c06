"""All variants on one yardstick: in order, with every pair compared, and not ordered further than the numbers allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lit_opd.lab.compare.pairs import holm, letters
from lit_opd.lab.compare.statistics import Array, Difference, Mean, mean_over_runs, paired_difference
from lit_opd.measures.table import Better, describe

__all__ = ["NOT_DISTINGUISHABLE", "NOT_TESTED", "Pair", "Ranking", "Row", "Values", "rank"]

Values = Mapping[str, Mapping[int, Array]]
"""Of one yardstick: variant -> seed -> values of the prompts, in one order everywhere."""

NOT_DISTINGUISHABLE = "not distinguishable"
NOT_TESTED = "not tested"
WORSE = "worse"
BETTER_ON_COMMON_SEEDS = "better on common seeds"
STANDINGS = {
    NOT_DISTINGUISHABLE: "not distinguishable from it:",
    WORSE: "worse:",
    BETTER_ON_COMMON_SEEDS: "better on the seeds that both finished:",
    NOT_TESTED: "not tested against it:",
}


@dataclass(frozen=True)
class Row:
    """A variant in a ranking.

    Attributes:
        variant: its name.
        mean: over its runs.
        letters: it is not distinguishable from variants with which it shares one.
        by_seed: the mean of each of its runs, by seed.
        standing: `best`, `worse`, `not distinguishable` (from the best), `better on common seeds` (than the best, where
            runs failed), `not tested` (one value of each, the same difference in every seed, or no common seed); empty
            where no direction is good.
    """

    variant: str
    mean: Mean
    letters: str
    by_seed: list[float]
    standing: str


@dataclass(frozen=True)
class Pair:
    """Two variants, compared over the seeds that both finished.

    Attributes:
        first: the one higher in the ranking.
        second: the other.
        difference: first minus second.
        corrected_p: p corrected for the number of pairs (Holm).
        distinguishable: whether it is below the level.
        verdict: in words.
    """

    first: str
    second: str
    difference: Difference
    corrected_p: float
    distinguishable: bool
    verdict: str


@dataclass(frozen=True)
class Ranking:
    """The variants on one yardstick.

    Attributes:
        yardstick: its name.
        rows: from best to worst by their means; from low to high where no direction is good.
        pairs: every pair of variants that share a seed.
        sentence: what may be concluded.
    """

    yardstick: str
    rows: list[Row]
    pairs: list[Pair]
    sentence: str


def rank(yardstick: str, values: Values, confidence: float, resamples: int) -> Ranking:
    """Compare every pair of variants and put them in order.

    Args:
        yardstick: its name.
        values: the same number of values for all runs.
        confidence: of intervals; one minus it is the level of the corrected tests.
        resamples: of bootstraps and sign flips.
    """
    better = describe(yardstick).better
    stacked = {variant: np.stack([by_seed[seed] for seed in sorted(by_seed)]) for variant, by_seed in values.items()}
    means = {variant: mean_over_runs(array, confidence, resamples) for variant, array in stacked.items()}
    order = sorted(means, key=lambda variant: means[variant].mean, reverse=better == "higher")
    pairs = _pairs(order, values, confidence, resamples, better)
    rows = _rows(order, stacked, means, pairs, better)
    return Ranking(yardstick, rows, pairs, _sentence(rows, pairs, better))


def _pairs(order: list[str], values: Values, confidence: float, resamples: int, better: Better | None) -> list[Pair]:
    found = {}
    for first, second in combinations(order, 2):
        if seeds := sorted(values[first].keys() & values[second].keys()):
            one, other = (np.stack([values[variant][seed] for seed in seeds]) for variant in (first, second))
            found[first, second] = paired_difference(one, other, confidence, resamples)
    corrected = holm([difference.p for difference in found.values()])
    return [
        Pair(*names, difference, p, p < 1 - confidence, _verdict(names, difference, p < 1 - confidence, better))
        for (names, difference), p in zip(found.items(), corrected, strict=True)
    ]


def _verdict(names: tuple[str, str], difference: Difference, distinguishable: bool, better: Better | None) -> str:
    if not distinguishable:
        return NOT_TESTED if difference.low is None else NOT_DISTINGUISHABLE
    lower, higher = names if difference.mean < 0 else names[::-1]
    return f"{lower} is lower" if better is None else f"{lower if better == 'lower' else higher} is better"


def _rows(
    order: list[str], values: Mapping[str, Array], means: Mapping[str, Mean], pairs: list[Pair], better: Better | None
) -> list[Row]:
    apart = np.zeros((len(order), len(order)), dtype=bool)
    for pair in pairs:
        i, j = order.index(pair.first), order.index(pair.second)
        apart[i, j] = apart[j, i] = pair.distinguishable
    standings = {order[0]: "best"} if order else {}
    for pair in pairs:
        if pair.first == order[0]:
            # Means are over all runs of a variant, pairs over common seeds: where runs failed, they may contradict.
            standing = WORSE if pair.verdict == f"{pair.first} is better" else BETTER_ON_COMMON_SEEDS
            standings[pair.second] = standing if pair.distinguishable else pair.verdict
    return [
        Row(variant, means[variant], group, values[variant].mean(1).tolist(),
            "" if better is None else standings.get(variant, NOT_TESTED))
        for variant, group in zip(order, letters(apart), strict=True)
    ]  # fmt: skip


def _sentence(rows: list[Row], pairs: list[Pair], better: Better | None) -> str:
    if len(rows) < 2:
        return "Fewer than two variants have finished runs: nothing is compared."
    if not pairs:
        return "No two variants share a finished seed: nothing is compared."
    if all(pair.verdict == NOT_TESTED for pair in pairs):
        one = all(pair.difference.seeds == 1 for pair in pairs)
        return f"{'One value of each variant' if one else 'The same difference in every seed'}: nothing can be tested."
    if not any(pair.distinguishable for pair in pairs):
        text = f"No two of the {len(rows)} variants can be told apart: they are {NOT_DISTINGUISHABLE}."
    elif better is None:
        text = "No direction of it is good, so nothing is ranked; the letters say what can be told apart."
    else:
        text = _best_and_rest(rows)
    one_seed = any(pair.difference.seeds == 1 for pair in pairs)
    return text + (" With one seed this says nothing about other seeds." if one_seed else "")


def _best_and_rest(rows: list[Row]) -> str:
    best, *others = rows
    if all(row.standing == WORSE for row in others):
        return f"`{best.variant}` is best, and can be told from each of the others."
    if all(row.standing == NOT_DISTINGUISHABLE for row in others):
        text = f"`{best.variant}` has the best mean, and is {NOT_DISTINGUISHABLE} from any other"
        return text + "; some of the others can be told apart."
    text = f"`{best.variant}` has the best mean"
    for standing, words in STANDINGS.items():
        names = [f"`{row.variant}`" for row in others if row.standing == standing]
        text += f"; {words} {', '.join(names)}" if names else ""
    return text + "."
