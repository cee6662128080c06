"""Write what stands between the markers of the pages of results, each block made of the numbers of one comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from lit_opd.lab.compare.analysis import COLLAPSED, EQUAL, WORSE, Analysis, Contrast, Row
from lit_opd.lab.compare.cells import amount, capital, code, interval, numbers, probability, table
from lit_opd.lab.compare.document import at_equal_cost, overview, sentence, setting
from lit_opd.measures.table import describe
from tools.results.store import Results

VERSUS, OF, RATE = " vs ", " of ", " lr="
DRAWN = ("accuracy", "reverse_kl", "student_entropy")
SEEDS = "seeds"
MEGA = 1e6


def block(what: str, results: Results) -> str:
    """Write the Markdown of a block.

    Args:
        what: of the marker: a name of `KINDS`, and what it takes.
        results: of the comparison.

    Raises:
        LookupError: no such block, or the comparison does not hold what it shows; the message says which.
    """
    kind, _, rest = what.partition(" ")
    if kind not in KINDS:
        raise LookupError(f"there is no block {kind!r}; there are {', '.join(KINDS)}")
    return "\n\n".join(KINDS[kind](results, rest.strip()))


def show_overview(results: Results, _: str) -> Iterable[str]:
    """Show all variants on all yardsticks with a direction, with their costs, as a report's first screen does."""
    yield overview(results.report)


def show_setting(results: Results, _: str) -> Iterable[str]:
    """Say how the runs were made, and which are missing."""
    yield setting(results.report)
    out = [[code(run.variant), str(run.seed), run.why] for run in results.report.left_out]
    yield table(["left out", "seed", "why"], out) if out else "All runs finished."


def ranking(results: Results, yardstick: str) -> Iterable[str]:
    """Show all objectives on one yardstick, in order, against the best."""
    found, described = _metric(results, yardstick), describe(yardstick)
    direction = f" {capital(found.better)} is better." if found.better else ""
    yield f"{capital(described.title)}.{direction} {sentence(found)}"
    mean, best = f"{described.title}, {described.unit} {_level(results)}", found.rows[0].variant
    if not found.better:
        yield table(["objective", mean], [[code(row.variant), interval(row)] for row in found.rows])
    else:
        against = {one.a: one for one in found.contrasts if one.b == best}
        header = ["objective", mean, f"{_kind(found)} to the best {_level(results)}", "corrected p", "verdict"]
        yield table(header, [_ranked(row, against.get(row.variant), found) for row in found.rows])
        yield _counted(found)
    if found.notes:
        yield "\n".join(f"- {note}" for note in found.notes)


def _ranked(row: Row, one: Contrast | None, found: Analysis) -> list[str]:
    compared = ["", ""] if one is None else [numbers(one, found.scale == "log"), probability(one.p)]
    return [code(row.variant), interval(row), *compared, row.verdict or ""]


def _counted(found: Analysis) -> str:
    """Count the pairs that could not be told apart, and those that a collapsed variant leaves to its own error."""
    counts = Counter(one.verdict for one in found.contrasts)
    told = f"{counts[EQUAL]} of {counts.total()} pairs could not be told apart"
    return f"{told}; {counts[COLLAPSED]} have an objective that collapsed." if counts[COLLAPSED] else f"{told}."


def pairs(results: Results, wanted: str) -> Iterable[str]:
    """Show chosen pairs, `A vs B; C vs D`, on every yardstick with a direction."""
    rows = []
    for names in wanted.split(";"):
        first, _, second = names.strip().partition(VERSUS)
        for yardstick, found in results.report.metrics.items():
            if found.contrasts:
                one = _contrast(found, yardstick, first, second)
                sign = "/" if found.scale == "log" else "-"
                rows.append([f"{code(first)} {sign} {code(second)}", describe(yardstick).title,
                             numbers(one, found.scale == "log"), probability(one.p), _told(one, found)])  # fmt: skip
    yield table(["pair", "yardstick", f"difference or ratio {_level(results)}", "corrected p", "verdict"], rows)


def _contrast(found: Analysis, yardstick: str, first: str, second: str) -> Contrast:
    """Find two variants among the contrasts, the first against the second."""
    for one in found.contrasts:
        if (one.a, one.b) == (first, second):
            return one
        if (one.a, one.b) == (second, first):
            low, high = (None if end is None else -end for end in (one.high, one.low))
            return replace(one, difference=-one.difference, low=low, high=high)
    raise LookupError(f"no pair {first!r}{VERSUS}{second!r} in {yardstick}")


def _told(one: Contrast, found: Analysis) -> str:
    """Say in words what a contrast came to, whichever of the two is named first."""
    fallen = [code(row.variant) for row in found.rows if row.verdict == COLLAPSED and row.variant in (one.a, one.b)]
    if one.verdict == COLLAPSED:
        return f"{' and '.join(fallen)} collapsed"
    if one.verdict == EQUAL:
        return "not told apart"
    return f"{code(one.b if one.verdict == WORSE else one.a)} is better"


def costs(results: Results, _: str) -> Iterable[str]:
    """Show what a run of each objective took."""
    header = ["objective", "tokens", "seconds", "tokens / step", "s / step", "tokens / s", "peak MB"]
    rows = []
    for cost in sorted(results.report.costs, key=lambda cost: (cost.seconds is None, cost.seconds)):
        rates = [(cost.tokens, cost.steps), (cost.seconds, cost.steps), (cost.tokens, cost.seconds)]
        shares = [amount(over / under) if over is not None and under else "" for over, under in rates]
        rows.append([code(cost.variant), amount(cost.tokens), amount(cost.seconds), *shares,
                     amount(cost.peak_memory_mb)])  # fmt: skip
    yield table(header, rows)


def equal_cost(results: Results, yardstick: str) -> Iterable[str]:
    """Show the means of the objectives at equal tokens and at equal seconds."""
    equals = [equal for equal in results.report.equal_costs if equal.yardstick == yardstick]
    if not equals:
        raise LookupError(f"nothing at equal cost of {yardstick!r}")
    out = [code(name) for name in results.report.variants if name not in equals[0].values]
    told = f"{capital(describe(yardstick).title)} at equal cost, the most that every run has spent; not tested."
    yield told + (f" Left out, for less than half of the median's tokens: {', '.join(out)}." if out else "")
    yield at_equal_cost(equals)


def compute(results: Results, _: str) -> Iterable[str]:
    """Add up what all runs took together."""
    metrics = results.report.metrics.values()
    runs = {row.variant: len(row.by_seed) for found in metrics for row in found.rows}
    totals = {
        name: sum((getattr(cost, name) or 0.0) * runs.get(cost.variant, 0) for cost in results.report.costs)
        for name in ("steps", "tokens", "seconds")
    }
    rows = [
        ["runs", str(sum(runs.values()))],
        ["training", f"{amount(totals['seconds'])} s for {amount(totals['steps'])} steps"],
        ["sampled for training", f"{totals['tokens'] / MEGA:.2f} million tokens"],
    ]
    if results.record:
        rows.append(["with loading, evaluation and logging", f"{amount(results.record['wall_seconds'])} s"])
    yield table(["", ""], rows)


def curve(results: Results, yardstick: str) -> Iterable[str]:
    """Show a yardstick at every evaluation, means over seeds."""
    if yardstick not in results.courses:
        raise LookupError(f"no curve of {yardstick!r}; there are {', '.join(results.courses)}")
    yield _course(results.courses[yardstick], f"{describe(yardstick).axis} at step", None)


def rates(results: Results, yardstick: str) -> Iterable[str]:
    """Show a yardstick of variants named `OBJECTIVE lr=RATE` by objective and rate, each objective's best in bold."""
    best, values = best_rates(results, yardstick), {row.variant: row.mean for row in _metric(results, yardstick).rows}
    shown = list(dict.fromkeys(variant.partition(RATE)[2] for variant in results.report.variants))
    rows = []
    for objective, chosen in best.items():
        cells = [amount(values[objective + RATE + rate]) for rate in shown]
        bold = [f"**{cell}**" if rate == chosen else cell for rate, cell in zip(shown, cells, strict=True)]
        rows.append([code(objective), *bold])
    yield table([f"{describe(yardstick).axis} at rate", *shown], rows)


def best_rates(results: Results, yardstick: str) -> dict[str, str]:
    """Choose the rate of each objective by a yardstick; of equal ones the lowest."""
    if other := [variant for variant in results.report.variants if RATE not in variant]:
        raise LookupError(f"{other[0]!r} is not named OBJECTIVE{RATE}RATE")
    found, best = _metric(results, yardstick), {}
    sign = 1 if found.better == "higher" else -1
    worth = {row.variant: sign * row.mean for row in found.rows}
    for variant in sorted(results.report.variants, key=lambda variant: float(variant.partition(RATE)[2])):
        objective, _, rate = variant.partition(RATE)
        if objective not in best or worth[variant] > worth[objective + RATE + best[objective]]:
            best[objective] = rate
    return best


def training(results: Results, what: str) -> Iterable[str]:
    """Show what training logs, at some steps, of some objectives: `train/entropy at 1 10 of A; B`; means over seeds."""
    name, _, rest = what.partition(" at ")
    steps, _, chosen = rest.partition(OF)
    found = results.record.get("training", {}).get(name)
    if found is None:
        raise LookupError(f"no {name!r} of training steps is stored")
    wanted = [variant.strip() for variant in chosen.split(";") if variant.strip()] or list(found)
    if unknown := [variant for variant in wanted if variant not in found]:
        raise LookupError(f"no {', '.join(map(repr, unknown))} among {', '.join(found)}")
    yield _course({variant: found[variant] for variant in wanted}, f"`{name}` at step", steps.split())


def figure(results: Results, which: str) -> Iterable[str]:
    """Show where every seed ended, `seeds`, or the learning curves of a yardstick, `curves accuracy`."""
    known = {SEEDS: ("Every seed of every objective", "a dot a seed, bars are intervals of the means, the dashed line "
                     "is the untrained student")}  # fmt: skip
    for name in DRAWN:
        curves = f"Learning curves of {describe(name).title}"
        known[f"curves {name}"] = (curves, "means over seeds, bands from the least seed to the most")
    if which not in known:
        raise LookupError(f"no figure {which!r}; there are {', '.join(known)}")
    title, how = known[which]
    yield f"![{title}]({results.figures}{file_of(results.name, which)})"
    yield f"{title}: {how}."


def file_of(name: str, which: str) -> str:
    """Name the file of a comparison's figure, in the folder of the numbers."""
    return f"results_{name}_{which.replace(' ', '_')}.png"


KINDS: dict[str, Callable[[Results, str], Iterable[str]]] = {
    "setting": show_setting, "overview": show_overview, "ranking": ranking, "pairs": pairs, "costs": costs,
    "equal-cost": equal_cost, "compute": compute, "curve": curve, "rates": rates,
    "training": training, "figure": figure,
}  # fmt: skip


def _course(by_variant: Mapping[str, Mapping[str, float]], title: str, steps: Sequence[str] | None) -> str:
    shown = steps or list(dict.fromkeys(step for course in by_variant.values() for step in course))
    rows = [
        [code(variant), *(f"{course[step]:.3g}" if step in course else "" for step in shown)]
        for variant, course in by_variant.items()
    ]
    return table([title, *shown], rows)


def _metric(results: Results, yardstick: str) -> Analysis:
    metrics = results.report.metrics
    if yardstick not in metrics:
        raise LookupError(f"no {yardstick!r}; there are {', '.join(metrics)}")
    return metrics[yardstick]


def _kind(found: Analysis) -> str:
    return "ratio" if found.scale == "log" else "difference"


def _level(results: Results) -> str:
    return f"[{100 * results.report.confidence:g} %]"
