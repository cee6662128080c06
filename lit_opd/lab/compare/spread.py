"""Estimate how far the means of variants would move with other seeds and other prompts.

`analysis` calls this. Seeds and prompts are crossed blocks: runs of one seed share their training prompts and uniform
numbers, and all runs are measured on the same prompts. A run's value is the mean of its variant, an effect of its seed,
and an error; its prompts add an effect of the prompt for each variant, and a rest.

- The error between seeds is pooled over all variants, in the additive model of variants and seeds, with
  (V - 1)(S - 1) degrees of freedom where three seeds of one pair leave two.
- A variant whose error is larger than that of the others keeps its own (Russell and Bradley, Biometrika 45, 1958: an
  exact F test, corrected for the number of variants), and leaves the pool; then the others are looked at again.
- The variance of the prompts is that of each contrast itself, less what the seeds' part has counted already.
- Degrees of freedom of a sum of variances are Satterthwaite's (Biometrics Bulletin 2, 1946).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["Estimate", "Seed", "Spread", "spread_of"]

OWN_SPREAD = 0.025  # level of the test for a variant whose error is larger

Array = NDArray[np.float64]
Seed = Any  # whatever names a seed: a number, or the text of a table
Runs = Mapping[str, Mapping[Seed, float]]
Values = Mapping[str, Mapping[Seed, Array]]


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with the variance of its estimate."""

    value: float
    variance: float
    df: float  # of the variance; 0 where nothing is known about it


@dataclass(frozen=True)
class Part:
    """A variance with its degrees of freedom."""

    variance: float
    df: float


@dataclass(frozen=True)
class Spread:
    """The means of variants, and the parts of the variance of each contrast.

    Attributes:
        means: of the variants, those with missing seeds adjusted for the effects of the seeds that they lack.
        own: variants whose error between seeds is their own, with its ratio to the pooled standard deviation.
        error: pooled variance between seeds, of one run, when the effect of the seed is taken off.
        total: the same with the effect of the seed.
    """

    means: Mapping[str, float]
    own: Mapping[str, float]
    error: Part
    total: Part
    _cofactors: Mapping[tuple[str, str], float]
    _alone: Mapping[str, Part]
    _influence: Values

    def mean_of(self, variant: str) -> Estimate:
        """Estimate the mean of a variant over other seeds and other prompts."""
        runs = len(self._influence[variant])
        part = self._alone.get(variant, self.total)
        return self._joined(self.means[variant], Part(part.variance / runs, part.df), self._influence[variant])

    def difference_of(self, a: str, b: str) -> Estimate:
        """Estimate the mean of `a` minus that of `b`."""
        value = self.means[a] - self.means[b]
        if (a, b) in self._cofactors:
            seeds = Part(self.error.variance * self._cofactors[a, b], self.error.df)
        else:
            alone = [self._alone.get(name, self.total) for name in (a, b)]
            seeds = _sum(*(Part(part.variance / len(self._influence[name]), part.df)
                           for name, part in zip((a, b), alone, strict=True)))  # fmt: skip
        one, other = self._influence[a], self._influence[b]
        common = one.keys() & other.keys()
        return self._joined(value, seeds, {seed: one[seed] - other[seed] for seed in common})

    def _joined(self, value: float, seeds: Part, influence: Mapping[Seed, Array]) -> Estimate:
        drawn, at_these_seeds = _prompts(np.array(list(influence.values())))
        both = _sum(seeds, drawn)
        # Values that are 0 or 1 may leave no error between seeds by chance, and still vary over prompts.
        found = both if both.variance >= at_these_seeds.variance else at_these_seeds
        return Estimate(value, found.variance, found.df)


def spread_of(runs: Runs, influence: Values, apart: Sequence[str] = ()) -> Spread:
    """Fit the means of variants and the variances around them.

    Args:
        runs: variant -> seed -> the value of a run, on the scale of the analysis.
        influence: variant -> seed -> what each prompt adds to that value [prompts], with a mean of zero.
        apart: variants that are no part of the pool, and whose error is their own where it is wider than the pool's.
    """
    pool, own = [name for name in runs if name not in apart], list[str]()
    while (outlier := _outlier(runs, pool)) is not None:
        pool.remove(outlier)
        own.append(outlier)
    others = _within({name: runs[name] for name in pool})
    own += [name for name in apart if _is_wider(_within({name: runs[name]}), others)]
    means, cofactors, error = _additive(runs, pool)
    total = _total(runs, pool, error)
    alone = {name: _within({name: runs[name]}) for name in own}
    means |= {name: float(np.mean(list(runs[name].values()))) for name in (*own, *apart)}
    ratios = {name: float(np.sqrt(part.variance / total.variance)) if total.variance else np.inf
              for name, part in alone.items()}  # fmt: skip
    return Spread(means, ratios, error, total, cofactors, alone, influence)


def _additive(runs: Runs, pool: list[str]) -> tuple[dict[str, float], dict[tuple[str, str], float], Part]:
    """Fit variants and seeds by least squares: adjusted means, variance factors of differences, the error."""
    seeds = list(dict.fromkeys(chain.from_iterable(runs[name] for name in pool)))
    cells = [(v, seeds.index(seed), value) for v, name in enumerate(pool) for seed, value in runs[name].items()]
    design = np.zeros((len(cells), len(pool) + len(seeds)))
    for row, (variant, seed, _) in enumerate(cells):
        design[row, variant] = design[row, len(pool) + seed] = 1.0
    if np.linalg.matrix_rank(design) < len(pool) + len(seeds) - 1:  # variants without a chain of common seeds
        design[:, len(pool) :] = 0.0
    values = np.array([value for *_, value in cells])
    inverse = np.linalg.pinv(design.T @ design)
    fitted = inverse @ design.T @ values
    left = float(((values - design @ fitted) ** 2).sum())
    df = len(cells) - int(np.linalg.matrix_rank(design))
    means = {name: float(np.mean(list(runs[name].values()))) for name in pool}
    if len(cells) < len(pool) * len(seeds):
        level = fitted[len(pool) :].mean()
        means = {name: float(fitted[place] + level) for place, name in enumerate(pool)}
    cofactors = {}
    for i, a in enumerate(pool):
        for j, b in enumerate(pool):
            contrast = np.zeros(len(inverse))
            contrast[i], contrast[j] = 1.0, -1.0
            if i != j and runs[a].keys() & runs[b].keys():
                cofactors[a, b] = float(contrast @ inverse @ contrast)
    return means, cofactors, Part(_cut(left / df, values) if df else 0.0, float(df))


def _within(runs: Runs) -> Part:
    """Pool the variance of runs around the mean of their variant."""
    arrays = [np.array(list(by_seed.values())) for by_seed in runs.values()]
    df = sum(len(array) - 1 for array in arrays)
    squares = sum(float(((array - array.mean()) ** 2).sum()) for array in arrays)
    return Part(_cut(squares / df, np.concatenate(arrays)), float(df)) if df else Part(0.0, 0.0)


def _total(runs: Runs, pool: list[str], error: Part) -> Part:
    """Pool the variance around the variants' means, which the effect of a seed moves together."""
    within = _within({name: runs[name] for name in pool})
    seeds = len(set(chain.from_iterable(runs[name] for name in pool)))
    if error.df == 0 or within.df == 0:
        return within
    n = len(pool)
    # In the mean squares of a table of variants and seeds: within = (of seeds + (n - 1) x error) / n.
    of_seeds = max(0.0, n * within.variance - (n - 1) * error.variance)
    df = _satterthwaite((of_seeds / n, seeds - 1), ((n - 1) / n * error.variance, error.df))
    # Rounded down, for a sum whose larger part has two or three degrees of freedom is not quite a chi-square variable.
    return Part(within.variance, max(1.0, float(np.floor(df))))


def _outlier(runs: Runs, pool: list[str]) -> str | None:
    """Find the variant whose error between seeds is larger than that of the others, if any."""
    seeds = [seed for seed in runs[pool[0]] if all(seed in runs[name] for name in pool)] if pool else []
    n, s = len(pool), len(seeds)
    if n < 3 or s < 3:  # two seeds leave too little to judge by
        return None
    table = np.array([[runs[name][seed] for seed in seeds] for name in pool])
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    squares = (left**2).sum(1) * n / (n - 1)
    place = int(squares.argmax())
    rest = float((left**2).sum() - squares[place])
    if _cut(float(squares[place]), table) == 0:
        return None
    if _cut(rest, table) == 0:
        return pool[place]
    ratio = squares[place] * (n - 2) / rest
    return pool[place] if n * special.fdtrc(s - 1, (s - 1) * (n - 2), ratio) < OWN_SPREAD else None


def _is_wider(one: Part, others: Part) -> bool:
    """Tell whether a variance is larger than that of the others, or cannot be compared with it."""
    if others.variance == 0 or one.df == 0 or others.df == 0:
        return True
    return bool(special.fdtrc(one.df, others.df, one.variance / others.variance) < OWN_SPREAD)


def _prompts(influence_SP: Array) -> tuple[Part, Part]:
    """Estimate the variance of a mean from drawing prompts, without and with what seeds have counted already."""
    seeds, prompts = influence_SP.shape if influence_SP.ndim == 2 else (0, 0)
    if seeds == 0 or prompts < 2:
        return Part(0.0, 0.0), Part(0.0, 0.0)
    by_prompt = influence_SP.mean(0)
    at_these_seeds = Part(float(by_prompt.var(ddof=1)) / prompts, prompts - 1.0)
    if seeds == 1:
        return at_these_seeds, at_these_seeds
    rest = influence_SP - by_prompt - influence_SP.mean(1, keepdims=True) + influence_SP.mean()
    counted = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1)) / seeds / prompts
    return Part(max(0.0, at_these_seeds.variance - counted), prompts - 1.0), at_these_seeds


def _sum(*parts: Part) -> Part:
    return Part(sum(part.variance for part in parts), _satterthwaite(*((part.variance, part.df) for part in parts)))


def _satterthwaite(*parts: tuple[float, float]) -> float:
    known = [(variance, df) for variance, df in parts if variance > 0 and df > 0]
    if not known:
        return max(df for _, df in parts)
    return sum(variance for variance, _ in known) ** 2 / sum(variance**2 / df for variance, df in known)


def _cut(variance: float, values: Array) -> float:
    """Take what rounding leaves of equal values as zero."""
    return variance if variance > (1e-12 * float(np.abs(values).max(initial=0.0))) ** 2 else 0.0
