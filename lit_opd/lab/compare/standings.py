"""Put variants in order on one yardstick, and not further than their paired differences allow.

`digest` calls `rank` for every yardstick, and again at equal cost, where a run is one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from lit_opd.lab.compare.paired import CONFIDENCE, Mean, holm, mean_of, p_value
from lit_opd.measures.table import Better, describe

__all__ = ["NOT_DISTINGUISHABLE", "NOT_TESTED", "Pair", "Ranking", "Row", "Values", "rank"]

Values = Mapping[str, Mapping[int, ArrayLike]]
"""Of one yardstick: variant -> seed -> values of the prompts, in one order everywhere."""

NOT_DISTINGUISHABLE, NOT_TESTED = "not distinguishable", "not tested"
WORSE, AHEAD = "worse", "ahead on common seeds"
STANDINGS = {
    NOT_DISTINGUISHABLE: "not distinguishable from it",
    WORSE: "worse",
    AHEAD: "better on the seeds that both finished",
    NOT_TESTED: "not tested against it",
}


@dataclass(frozen=True)
class Row:
    """A variant in a ranking.

    Its standing is `best`, or towards the best: `worse`, `not distinguishable`, `ahead on common seeds` (where runs
    failed), `not tested` (one value of each, the same difference in every seed, or no common seed). Where no direction
    is good, `lowest` stands for the best and `higher` for worse.
    """

    variant: str
    mean: Mean
    by_seed: list[float]
    standing: str


@dataclass(frozen=True)
class Pair:
    """Two variants, compared over the seeds that both finished."""

    first: str  # the one higher in the ranking
    second: str
    difference: Mean  # first minus second
    p: float  # probability of a difference at least so large were there none
    corrected_p: float  # for the number of pairs (Holm)
    distinguishable: bool  # True where that is below the level
    verdict: str  # in words, names between backticks


@dataclass(frozen=True)
class Ranking:
    """The variants on one yardstick."""

    yardstick: str
    rows: list[Row]  # from best to worst by their means; from low to high where no direction is good
    pairs: list[Pair]  # every two variants that share a seed
    sentence: str  # what may be concluded


def rank(yardstick: str, values: Values) -> Ranking:
    """Compare every pair of variants on a yardstick and put them in order, no further than the numbers allow."""
    better = describe(yardstick).better
    runs = {variant: np.array([by_seed[s] for s in sorted(by_seed)]) for variant, by_seed in values.items()}
    means = {variant: mean_of(array) for variant, array in runs.items()}
    order = sorted(means, key=lambda variant: means[variant].mean, reverse=better == "higher")
    pairs = _pairs(order, values, better)
    standings = {pair.second: _standing(pair, better) for pair in pairs if pair.first == order[0]}
    standings |= {variant: "best" if better else "lowest" for variant in order[:1]}
    rows = [Row(name, means[name], runs[name].mean(1).tolist(), standings.get(name, NOT_TESTED)) for name in order]
    return Ranking(yardstick, rows, pairs, _sentence(rows, pairs, better))


def _pairs(order: list[str], values: Values, better: Better | None) -> list[Pair]:
    found = {}
    for names in combinations(order, 2):
        if seeds := sorted(values[names[0]].keys() & values[names[1]].keys()):
            one, other = (np.array([values[name][seed] for seed in seeds]) for name in names)
            found[names] = one - other
    p_values = [p_value(differences) for differences in found.values()]
    pairs = []
    for (names, differences), p, corrected in zip(found.items(), p_values, holm(p_values), strict=True):
        mean, distinguishable = mean_of(differences), corrected < 1 - CONFIDENCE
        pairs.append(Pair(*names, mean, p, corrected, distinguishable, _verdict(names, mean, distinguishable, better)))
    return pairs


def _verdict(names: tuple[str, str], difference: Mean, distinguishable: bool, better: Better | None) -> str:
    if not distinguishable:
        return NOT_TESTED if difference.low is None else NOT_DISTINGUISHABLE
    lower, higher = names if difference.mean < 0 else names[::-1]
    return f"`{lower}` is lower" if better is None else f"`{lower if better == 'lower' else higher}` is better"


def _standing(pair: Pair, better: Better | None) -> str:
    if not pair.distinguishable:
        return pair.verdict
    # Means are over all runs of a variant, pairs over common seeds: where runs failed, they may contradict.
    if pair.verdict != f"`{pair.first}` is {'better' if better else 'lower'}":
        return AHEAD
    return WORSE if better else "higher"


def _sentence(rows: list[Row], pairs: list[Pair], better: Better | None) -> str:
    if not pairs:
        why = "Fewer than two variants have finished runs" if len(rows) < 2 else "No two variants share a finished seed"
        return f"{why}: nothing is compared."
    one_seed = any(pair.difference.seeds == 1 for pair in pairs)
    if all(pair.verdict == NOT_TESTED for pair in pairs):
        why = "One value of each variant" if one_seed else "The same difference in every seed"
        return f"{why}: nothing can be tested."
    apart = sum(pair.distinguishable for pair in pairs)
    if not apart:
        text = f"No two of the {len(rows)} variants can be told apart: they are {NOT_DISTINGUISHABLE}."
    elif better is None:
        text = f"No direction of it is good, so nothing is ranked; {apart} of {len(pairs)} pairs can be told apart."
    elif all(row.standing == WORSE for row in rows[1:]):
        text = f"`{rows[0].variant}` is best, and can be told from each of the others."
    else:
        parts = {words: [f"`{r.variant}`" for r in rows if r.standing == key] for key, words in STANDINGS.items()}
        told = "; ".join(f"{words}: {', '.join(names)}" for words, names in parts.items() if names)
        text = f"`{rows[0].variant}` has the best mean; {told}."
    return text + " With one seed this says nothing about other seeds." * one_seed
