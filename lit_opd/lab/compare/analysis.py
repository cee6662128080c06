"""Say of one yardstick which variants are best, equal, worse or collapsed, by one analysis.

`digest` calls this for the runs of a comparison, `from_table` for results that were made elsewhere. docs/statistics.md
has the reasons and the simulations.

A yardstick that spans orders of magnitude (a KL, a negative log-likelihood) is analysed by its logarithm: the value of
a run is the log of its mean over the prompts, differences are logs of ratios, and a variant's mean is the geometric
mean over its seeds. `spread` estimates the error, `simultaneous` corrects for the contrasts that are asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_opd.lab.compare.contrasts import ALL, TO_THE_BEST
from lit_opd.lab.compare.simultaneous import (
    LEVEL,
    Statistic,
    Tail,
    Verdict,
    baseline_tail,
    critical,
    range_tail,
    step_down,
    t_tail,
)
from lit_opd.lab.compare.spread import Estimate, Seed, Spread, spread_of
from lit_opd.measures.intervals import wilson_over_prompts
from lit_opd.measures.table import Better, Scale

__all__ = ["COLLAPSED", "CONFIDENCE", "EQUAL", "LARGEST_LOG", "WORSE", "Analysis", "Contrast", "NotAboveZero", "Row",
           "Rules", "analyse"]  # fmt: skip

CONFIDENCE = 1 - LEVEL
EQUAL, WORSE, BETTER, COLLAPSED = "equal", "worse", "better", "collapsed"
AS_BAD_AS_UNTRAINED = 2.0  # a run that ends so many times as bad as the untrained student has collapsed
AS_BAD_AS_THE_BEST = 10.0  # where the untrained student is not known: a run, against every run of the best
FAR_IN_SPREADS = 4.0  # and so many standard deviations between seeds on a log, of the median variant
LARGEST_LOG = 700.0  # what e is raised to without an overflow

Values = Mapping[str, Mapping[Seed, ArrayLike]]
"""Of one yardstick: variant -> seed -> values of the prompts, in one order everywhere; or a run's one value."""


@dataclass(frozen=True)
class Rules:
    """The way in which a yardstick is analysed.

    Attributes:
        better: the good direction, None where there is none: then nothing is tested.
        scale: `log` or `raw`.
        least: no value is smaller.
        most: no value is larger.
        untrained: its value before training, where it is known.
        contrasts: `best`, `all`, or the name of a variant as the baseline.
    """

    better: Better | None
    scale: Scale = "raw"
    least: float = -math.inf
    most: float = math.inf
    untrained: float | None = None
    contrasts: str = TO_THE_BEST


@dataclass(frozen=True)
class Row:
    """A variant: its mean over seeds, with an interval for other seeds and other prompts."""

    variant: str
    mean: float | None  # None where no run has a finite value
    low: float | None  # None where one value is all there is
    high: float | None
    verdict: str | None  # best, equal, worse or collapsed; None where no direction is good
    by_seed: dict[Seed, float]
    collapsed_runs: int = 0


@dataclass(frozen=True)
class Contrast:
    """Two variants on the scale of the analysis, logs of ratios on a log scale."""

    a: str
    b: str  # the best, or the baseline
    difference: float  # a minus b
    low: float | None
    high: float | None
    p: float  # corrected for the contrasts that were asked
    verdict: str  # of a, towards b: better, equal, worse, collapsed


@dataclass(frozen=True)
class Analysis:
    """All that is said of one yardstick."""

    better: Better | None
    scale: Scale
    rows: list[Row]  # from best to worst by their means, collapsed ones last
    contrasts: list[Contrast]
    notes: list[str] = field(default_factory=list)  # what a reader has to know of the method, a sentence each


class NotAboveZero(ValueError):
    """A run whose mean has no logarithm."""


def analyse(values: Values, rules: Rules) -> Analysis:
    """Analyse one yardstick.

    Raises:
        NotAboveZero: a value on a log scale has no logarithm.
    """
    arrays = {name: {seed: np.atleast_1d(np.asarray(x, dtype=np.float64)) for seed, x in by_seed.items()}
              for name, by_seed in values.items()}  # fmt: skip
    means = {name: {seed: float(x.mean()) for seed, x in by_seed.items()} for name, by_seed in arrays.items()}
    finite = {name: {seed: m for seed, m in by_seed.items() if math.isfinite(m)} for name, by_seed in means.items()}
    if rules.scale == "log" and any(m <= 0 for by_seed in finite.values() for m in by_seed.values()):
        raise NotAboveZero("a value that is not above 0 has no logarithm")
    collapsed = _collapsed(means, rules)
    known = {name: by_seed for name, by_seed in finite.items() if by_seed}
    onto = np.log if rules.scale == "log" else np.asarray
    runs = {name: {seed: float(onto(m)) for seed, m in by_seed.items()} for name, by_seed in known.items()}
    influence = {name: {seed: _influence(arrays[name][seed], m, rules.scale) for seed, m in by_seed.items()}
                 for name, by_seed in known.items()}  # fmt: skip
    spread = spread_of(runs, influence, [name for name in runs if collapsed[name]])
    order = sorted(runs, key=lambda name: (bool(collapsed[name]), spread.means[name] * _sign(rules.better)))
    standing = [name for name in order if not collapsed[name]]
    contrasts = _contrasts(spread, order, standing, rules)
    verdicts = _verdicts(spread, standing, contrasts, rules)
    prompts = {name: len(next(iter(by_seed.values()))) for name, by_seed in arrays.items()}
    rows = [_row(name, spread, means[name], verdicts.get(name), collapsed[name], rules, prompts[name])
            for name in order]  # fmt: skip
    lost = [Row(name, None, None, None, COLLAPSED, means[name], len(means[name])) for name in means if name not in runs]
    return Analysis(rules.better, rules.scale, rows + lost, contrasts, _notes(spread, values, collapsed))


def _sign(better: Better | None) -> int:
    return -1 if better == "higher" else 1


def _influence(values_P: NDArray[np.float64], mean: float, scale: Scale) -> NDArray[np.float64]:
    """Find what each prompt adds to a run's value, which on a log scale is the first term of a series."""
    return values_P / mean - 1 if scale == "log" else values_P - mean


def _collapsed(means: Mapping[str, Mapping[Seed, float]], rules: Rules) -> dict[str, int]:
    """Count the runs of each variant that have collapsed."""
    found = {name: sum(not math.isfinite(m) for m in by_seed.values()) for name, by_seed in means.items()}
    if rules.better is None:
        return found

    def times_as_bad(one: float, other: float) -> float:
        worse, than = (one, other) if rules.better == "lower" else (other, one)
        return worse / than if worse > 0 and than > 0 else math.inf if worse > 0 and than == 0 else 0.0

    if rules.untrained is not None:
        for name, by_seed in means.items():
            ratios = [times_as_bad(m, rules.untrained) for m in by_seed.values() if math.isfinite(m)]
            found[name] += sum(ratio > AS_BAD_AS_UNTRAINED for ratio in ratios)
        return found
    whole = {name: list(by_seed.values()) for name, by_seed in means.items() if not found[name]}
    if not whole or (rules.scale == "raw" and rules.least != 0):  # nothing is so many times as bad without a zero
        return found
    best = whole[min(whole, key=lambda name: float(np.mean(whole[name])) * _sign(rules.better))]
    # Where the seeds of all variants lie far apart, so do good runs.
    spreads = [float(np.std(np.log(runs), ddof=1)) for runs in whole.values() if len(runs) > 1 and min(runs) > 0]
    limit = max(AS_BAD_AS_THE_BEST, math.exp(FAR_IN_SPREADS * float(np.median(spreads or [0.0]))))
    for name, runs in whole.items():
        found[name] = sum(min(times_as_bad(m, other) for other in best) >= limit for m in runs)
    return found


def _contrasts(spread: Spread, order: Sequence[str], standing: Sequence[str], rules: Rules) -> list[Contrast]:
    """Judge the contrasts that are asked, and beside them those of collapsed variants, each by its own error."""
    if rules.better is None or len(order) < 2:
        return []
    against = order[0] if rules.contrasts in (TO_THE_BEST, ALL) else rules.contrasts
    asked = [(name, against) for name in order if name != against]
    if rules.contrasts == ALL:
        asked = [(worse, better) for better, worse in combinations(order, 2)]
    pairs = [pair for pair in asked if set(pair) <= set(standing)]
    judged = list(zip(pairs, _judge(spread, pairs, standing, rules), strict=True))
    judged += [(pair, _alone(spread.difference_of(*pair))) for pair in asked if pair not in pairs]
    return [_contrast(pair, spread.difference_of(*pair), verdict, standing, rules) for pair, verdict in judged]


def _judge(
    spread: Spread, pairs: Sequence[tuple[str, str]], standing: Sequence[str], rules: Rules
) -> list[Verdict | None]:
    statistics = [_statistic(spread.difference_of(*pair)) for pair in pairs]
    tested = [one for one in statistics if one is not None]
    if rules.contrasts == ALL:
        verdicts = [_one_step(one, range_tail, len(standing)) for one in tested]
    elif rules.contrasts == TO_THE_BEST:
        verdicts = step_down(tested, range_tail, smallest=2)
    else:
        verdicts = step_down(tested, baseline_tail, smallest=1)
    remaining = iter(verdicts)
    return [None if one is None else next(remaining) for one in statistics]


def _one_step(one: Statistic, tail: Tail, size: int) -> Verdict:
    return Verdict(tail(one.t, size, one.df), critical(tail, size, one.df))


def _alone(difference: Estimate) -> Verdict | None:
    one = _statistic(difference)
    return None if one is None else _one_step(one, t_tail, 1)


def _statistic(difference: Estimate) -> Statistic | None:
    """Divide a difference by its standard error, None where there is no error to tell it from."""
    if difference.df <= 0 or difference.variance <= 0:
        return None
    return Statistic(abs(difference.value) / math.sqrt(difference.variance), difference.df)


def _contrast(
    pair: tuple[str, str], found: Estimate, verdict: Verdict | None, standing: Sequence[str], rules: Rules
) -> Contrast:
    a, b = pair
    if verdict is None:
        low = high = None
    else:
        half = verdict.critical * math.sqrt(found.variance)
        widest = rules.most - rules.least if rules.scale == "raw" else math.inf
        low, high = max(found.value - half, -widest), min(found.value + half, widest)
    if a not in standing:
        told = COLLAPSED
    elif verdict is None or not verdict.told:
        told = EQUAL
    else:
        told = WORSE if found.value * _sign(rules.better) > 0 else BETTER
    return Contrast(a, b, found.value, low, high, 1.0 if verdict is None else verdict.p, told)


def _verdicts(spread: Spread, standing: Sequence[str], contrasts: Sequence[Contrast], rules: Rules) -> dict[str, str]:
    """Hold every variant that has not collapsed against the best."""
    if rules.better is None or not standing:
        return {}
    best = standing[0]
    if rules.contrasts not in (TO_THE_BEST, ALL):
        contrasts = _contrasts(spread, standing, standing, replace(rules, contrasts=TO_THE_BEST))
    worse = {contrast.a for contrast in contrasts if contrast.b == best and contrast.verdict == WORSE}
    return {name: "best" if name == best else "worse" if name in worse else "equal" for name in standing}


def _row(
    name: str,
    spread: Spread,
    by_seed: Mapping[Seed, float],
    verdict: str | None,
    collapsed: int,
    rules: Rules,
    prompts: int,
) -> Row:
    def back(value: float) -> float:
        return math.exp(min(value, LARGEST_LOG)) if rules.scale == "log" else value

    found = spread.mean_of(name)
    low = high = None
    if found.df > 0 and found.variance > 0:
        half = critical(t_tail, 1, found.df) * math.sqrt(found.variance)
        low, high = max(back(found.value - half), rules.least), min(back(found.value + half), rules.most)
    elif rules.most == 1 and prompts > 1:  # a share that is 0 or 1 for every prompt
        low, high = wilson_over_prompts([found.value] * prompts, [1.0] * prompts)[1:]
    said = COLLAPSED if collapsed and rules.better is not None else verdict
    return Row(name, back(found.value), low, high, said, dict(by_seed), collapsed)


def _notes(spread: Spread, values: Values, collapsed: Mapping[str, int]) -> list[str]:
    seeds = {name: len(by_seed) for name, by_seed in values.items()}
    notes = [
        f"The error between seeds of `{name}` is {ratio:.1f} times that of the others, and is its own here."
        for name, ratio in spread.own.items() if not collapsed[name]
    ]  # fmt: skip
    notes += [f"`{name}` collapsed in {count} of {seeds[name]} runs." for name, count in collapsed.items() if count]
    if max(seeds.values(), default=0) == 1:
        notes.append("One seed of each: this says nothing of other seeds.")
    return notes
