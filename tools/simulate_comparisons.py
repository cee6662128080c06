"""Simulate comparisons whose truth is known, and write what their analysis finds into docs/statistics.md.

Usage: ``python -m tools.simulate_comparisons [--repetitions 2000]``, five minutes on one core. The analysis is that of
`compare`; beside it stands the method of before: paired t tests of all pairs on the raw scale, corrected by Holm.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from lit_opd.lab.compare.analysis import WORSE, Rules, analyse
from lit_opd.lab.compare.cells import table
from lit_opd.lab.compare.power import power_of, smallest_difference

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
VARIANTS = 5
SEEDS = (2, 3, 4, 5, 8, 10)
LEVEL = 0.05
Truth = tuple[float, ...]


@dataclass(frozen=True)
class World:
    """What a comparison is drawn from, in standard deviations between the seeds of a variant.

    Attributes:
        truth: the means of the variants, of which the highest is best.
        seeds: of each variant.
        spreads: of each variant.
        seed_effect: spread of what a seed does to all variants.
        prompts: of each run; 1 draws a value a run.
        prompt_effect: spread of what a prompt does to all variants.
        interaction: spread of what a prompt does to one variant.
        rest: spread of a value around all of these.
    """

    truth: Truth
    seeds: int
    spreads: tuple[float, ...] = (1.0,) * VARIANTS
    seed_effect: float = 0.0
    prompts: int = 1
    prompt_effect: float = 0.0
    interaction: float = 0.0
    rest: float = 0.0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw values [variants, seeds, prompts]."""
        v, s, p = len(self.truth), self.seeds, self.prompts
        runs_VS = np.array(self.truth)[:, None] + np.array(self.spreads)[:, None] * rng.standard_normal((v, s))
        runs_VS = runs_VS + self.seed_effect * rng.standard_normal(s)
        values_VSP = np.repeat(runs_VS[..., None], p, -1)
        values_VSP = values_VSP + self.prompt_effect * rng.standard_normal(p)
        values_VSP = values_VSP + self.interaction * rng.standard_normal((v, 1, p))
        return values_VSP + self.rest * rng.standard_normal((v, s, p))


@dataclass
class Found:
    """Shares of repetitions."""

    false: float = 0.0  # that call a variant worse which is not
    all_true: float = 0.0  # that call every variant worse which is
    true: float = 0.0  # of the true differences from the best, that are found
    means: float = 0.0  # of intervals of means, that hold the truth
    contrasts: float = 0.0  # of intervals of differences from the best, that hold the truth


def simulate(world: World, repetitions: int, seed: int = 0, contrasts: str = "best") -> Found:
    """Analyse so many comparisons as `compare` does."""
    rng, found = np.random.default_rng(seed), Found()
    truth = {str(number): mean for number, mean in enumerate(world.truth)}
    for _ in range(repetitions):
        values = world.draw(rng)
        analysed = analyse({name: dict(enumerate(values[int(name)])) for name in truth},
                           Rules("higher", contrasts=contrasts))  # fmt: skip
        told = {(one.a, one.b): one.verdict == WORSE for one in analysed.contrasts}
        found.false += any(worse and truth[a] >= truth[b] for (a, b), worse in told.items())
        behind = [worse for (a, b), worse in told.items() if truth[a] < truth[b]]
        found.all_true += bool(behind) and all(behind)
        found.true += float(np.mean(behind)) if behind else 0.0
        found.means += np.mean([row.low <= truth[row.variant] <= row.high for row in analysed.rows])
        found.contrasts += np.mean([one.low <= truth[one.a] - truth[one.b] <= one.high for one in analysed.contrasts])
    for name in ("false", "all_true", "true", "means", "contrasts"):
        setattr(found, name, getattr(found, name) / repetitions)
    return found


def simulate_before(world: World, repetitions: int, seed: int = 0) -> Found:
    """Analyse so many comparisons of one value a run by paired t tests of all pairs, corrected by Holm."""
    rng, found = np.random.default_rng(seed), Found()
    pairs = list(combinations(range(len(world.truth)), 2))
    for _ in range(repetitions):
        runs_VS = world.draw(rng).mean(-1)
        differences_NS = np.array([runs_VS[a] - runs_VS[b] for a, b in pairs])
        p_N = _holm(stats.ttest_1samp(differences_NS, 0.0, axis=1).pvalue)
        best = int(runs_VS.mean(1).argmax())
        told = {a if b == best else b: p < LEVEL for (a, b), p in zip(pairs, p_N, strict=True) if best in (a, b)}
        found.false += any(worse and world.truth[a] >= world.truth[best] for a, worse in told.items())
        behind = [worse for a, worse in told.items() if world.truth[a] < world.truth[best]]
        found.all_true += bool(behind) and all(behind)
        found.true += float(np.mean(behind)) if behind else 0.0
    for name in ("false", "all_true", "true"):
        setattr(found, name, getattr(found, name) / repetitions)
    return found


def _holm(p_N: np.ndarray) -> np.ndarray:
    order = p_N.argsort()
    steps = np.minimum(np.maximum.accumulate((len(p_N) - np.arange(len(p_N))) * p_N[order]), 1.0)
    return steps[order.argsort()]


def ahead(by: float) -> Truth:
    """One variant is better than four that are equal, the hardest case: each of the four has to be told."""
    return (by, *[0.0] * (VARIANTS - 1))


def errors_and_coverage(repetitions: int) -> str:
    """False findings and coverage where all variants are equal, and power where one is better, by seeds."""
    rows = []
    for seeds in SEEDS:
        null, before = (run(World(ahead(0.0), seeds), repetitions) for run in (simulate, simulate_before))
        powers = []
        for by in (2.0, 3.0, 4.0):
            world = World(ahead(by), seeds)
            powers += [share(simulate(world, repetitions).true), share(simulate_before(world, repetitions).true)]
        first = [str(seeds), share(null.false), share(before.false), share(null.means), share(null.contrasts)]
        rows.append([*first, *powers])
    header = ["seeds", "false", "before", "means", "differences"]
    return table([*header, *(cell for by in (2, 3, 4) for cell in (f"found, {by} sd", "before"))], rows)


def other_worlds(repetitions: int) -> str:
    """False findings and coverage where the assumptions do not hold, or more is drawn than seeds."""
    even = ahead(0.0)
    worlds = {
        "a seed moves all variants by 2 sd": World(even, 3, seed_effect=2.0),
        "40 prompts that vary by 3 sd, and by 3 sd for each variant": World(
            even, 3, prompts=40, prompt_effect=3.0, interaction=3.0, rest=3.0
        ),
        "the same with 5 seeds": World(even, 5, prompts=40, prompt_effect=3.0, interaction=3.0, rest=3.0),
        "one variant with 3 times the error": World(even, 3, spreads=(1.0, 1.0, 1.0, 1.0, 3.0)),
        "the same with 5 seeds ": World(even, 5, spreads=(1.0, 1.0, 1.0, 1.0, 3.0)),
        "one variant with 10 times the error": World(even, 3, spreads=(1.0, 1.0, 1.0, 1.0, 10.0)),
        "two best of five, the others 4 sd behind": World((4.0, 4.0, 0.0, 0.0, 0.0), 3),
        "twelve variants": World((0.0,) * 12, 3, spreads=(1.0,) * 12),
    }
    rows = []
    for words, world in worlds.items():
        found = simulate(world, repetitions)
        rows.append([words.strip(), str(world.seeds), share(found.false), share(found.means), share(found.contrasts)])
    return table(["where", "seeds", "false", "means", "differences"], rows)


def theory(_: int) -> str:
    """The difference from the best that is found, in standard deviations between seeds, by theory."""
    counts = (2, 3, 5, 12)
    rows = []
    for seeds in SEEDS:
        sights = [smallest_difference(variants, seeds) for variants in counts]
        rows.append([str(seeds), *(f"{sight.half:.2f}, {sight.nine_in_ten:.2f}" for sight in sights),
                     share(power_of(4.0, VARIANTS, seeds))])  # fmt: skip
    return table(["seeds", *(f"{n} variants" for n in counts), "found, 4 sd, 5 variants"], rows)


def share(value: float) -> str:
    """Write a share in percent."""
    return f"{100 * value:.1f}"


TABLES = {"seeds": errors_and_coverage, "worlds": other_worlds, "theory": theory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="of each row")
    repetitions = parser.parse_args().repetitions
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        end = f"<!-- /{name} -->"
        text = f"{before}<!-- {name} -->\n{make(repetitions)}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
