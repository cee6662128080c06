"""What stands between the markers of RESULTS.md, each made of the stored numbers of one comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_opd.lab.compare.accounting import COSTS
from lit_opd.lab.compare.blocks import Block, Details, Table, Text, markdown_page
from lit_opd.lab.compare.statistics import Mean
from lit_opd.lab.compare.words import amount, interval, probability

from lit_opd.measures.table import describe

VERSUS, OF = " vs ", " of "
FIGURES = ("curves_accuracy", "curves_reverse_kl", "curves_student_entropy", "pareto_accuracy")
CAPTIONS = {
    "curves": "Learning curves of {}: means over seeds, bands from the least seed to the most.",
    "pareto": "Final {} against cost: bars go from the least seed to the most; filled and joined are those that no "
    "other beats in both, by the means.",
}
MEGA = 1e6


def block(what: str, stored: Mapping[str, Any]) -> str:
    """The Markdown of a block.

    Args:
        what: of the marker: a name of `KINDS`, and what it takes.
        stored: numbers of the comparison, by `store.trim`.

    Raises:
        LookupError: no such block, or the comparison does not hold what it shows; the message says which.
    """
    kind, _, rest = what.partition(" ")
    if kind not in KINDS:
        raise LookupError(f"there is no block {kind!r}; there are {', '.join(KINDS)}")
    return markdown_page(KINDS[kind](stored, rest.strip())).strip()


def setting(stored: Mapping[str, Any], _: str) -> list[Block]:
    """What was compared, and which runs are missing."""
    level = 100 * stored["confidence"]
    rows = [
        ["objectives", str(len(stored["variants"]))],
        ["seeds", ", ".join(map(str, stored["seeds"]))],
        ["steps of a run", amount(max(cost["steps"] for cost in stored["costs"]))],
        ["held-out prompts", str(stored["prompts"])],
        ["level", f"{level:g} % intervals, tests at {100 - level:.3g} %"],
        ["runs that did not finish", str(len(stored["left_out"]) or "none")],
    ]
    out = [[_code(run["variant"]), str(run["seed"]), run["why"]] for run in stored["left_out"]]
    return [Table(["", ""], rows), *([Table(["left out", "seed", "why"], out)] if out else [])]


def ranking(stored: Mapping[str, Any], yardstick: str) -> list[Block]:
    """All objectives on one yardstick, in order."""
    found = _ranking(stored, yardstick)
    described, best = describe(yardstick), found["rows"][0]["variant"]
    level = f"[{100 * stored['confidence']:g} %]"
    against = {pair["second"]: pair for pair in found["pairs"] if pair["first"] == best}
    rows = []
    for row in found["rows"]:
        pair = against.get(row["variant"])
        rest = ["", ""] if pair is None else [_difference(pair, turned=True), probability(pair["corrected_p"])]
        rows.append([_code(row["variant"]), _mean(row), *rest, row["letters"]])
    first = "best" if described.better else "lowest"
    header = [
        f"{described.title}, {described.unit} {level}",
        f"difference to {first} {level}",
        "corrected p",
        "letters",
    ]
    seeds = sorted({row["mean"]["seeds"] for row in found["rows"]})
    better = f"{described.better} is better" if described.better else "no direction is good by itself"
    told = f"{_capital(described.title)}: {better}; {' or '.join(map(str, seeds))} seeds each. {found['sentence']}"
    return [Text(told), Table(["objective", *header], rows)]


def ties(stored: Mapping[str, Any], yardstick: str) -> list[Block]:
    """Which pairs could not be told apart."""
    found = _ranking(stored, yardstick)
    tied = [pair for pair in found["pairs"] if not pair["distinguishable"]]
    title = describe(yardstick).title
    told = f"{_capital(title)}: {len(tied)} of {len(found['pairs'])} pairs could not be told apart."
    if not tied:
        return [Text(told)]
    header = ["first", "second", f"first - second [{100 * stored['confidence']:g} %]", "corrected p"]
    rows = [
        [_code(pair["first"]), _code(pair["second"]), _difference(pair), probability(pair["corrected_p"])]
        for pair in tied
    ]
    return [Text(told), Details(f"The {len(tied)} pairs not told apart in {title}", [Table(header, rows)])]


def pairs(stored: Mapping[str, Any], wanted: str) -> list[Block]:
    """Chosen pairs, `A vs B; C vs D`, on every yardstick."""
    rows = []
    for names in wanted.split(";"):
        first, _, second = names.strip().partition(VERSUS)
        for found in stored["rankings"]:
            pair, turned = _pair(found, first, second)
            shown = [_difference(pair, turned), probability(pair["corrected_p"]), _verdict(pair)]
            rows.append([f"{_code(first)} - {_code(second)}", describe(found["yardstick"]).title, *shown])
    level = f"[{100 * stored['confidence']:g} %]"
    return [Table(["pair", "yardstick", f"difference {level}", "corrected p", "verdict"], rows)]


def costs(stored: Mapping[str, Any], _: str) -> list[Block]:
    """What a run of each objective took."""
    header = ["objective", "tokens", "seconds", "tokens / step", "s / step", "tokens / s", "peak MB"]
    rows = []
    for cost in sorted(stored["costs"], key=lambda cost: (cost["seconds"] is None, cost["seconds"])):
        rates = [(cost["tokens"], cost["steps"]), (cost["seconds"], cost["steps"]), (cost["tokens"], cost["seconds"])]
        shares = [amount(over / under) if over is not None and under else "" for over, under in rates]
        totals = [amount(cost["tokens"]), amount(cost["seconds"])]
        rows.append([_code(cost["variant"]), *totals, *shares, amount(cost["peak_memory_mb"])])
    return [Table(header, rows)]


def equal_cost(stored: Mapping[str, Any], yardstick: str) -> list[Block]:
    """The objectives at equal tokens and at equal seconds."""
    found = _named(stored["equal_costs"], yardstick)
    kinds = [cost for cost in COSTS if cost in found]
    columns = [{row["variant"]: [_mean(row), row["letters"]] for row in found[kind]["rows"]} for kind in kinds]
    header = ["objective"]
    for kind in kinds:
        header += [f"at {amount(found[kind]['budget'])} {COSTS[kind]}", "letters"]
    variants = dict.fromkeys(variant for column in columns for variant in column)
    rows = [[_code(v), *(cell for column in columns for cell in column.get(v, ["", ""]))] for v in variants]
    out = ", ".join(map(_code, found["left_out"]))
    told = f"{_capital(describe(yardstick).title)} at equal cost, the most that every run has spent."
    told += f" Left out, for less than half of the median's tokens: {out}." if out else ""
    return [Text(told), Table(header, rows)]


def compute(stored: Mapping[str, Any], _: str) -> list[Block]:
    """What all runs took together, and on what."""
    runs = {row["variant"]: row["mean"]["seeds"] for row in stored["rankings"][0]["rows"]}
    totals = {
        name: sum((cost[name] or 0.0) * runs.get(cost["variant"], 0) for cost in stored["costs"])
        for name in ("steps", "tokens", "seconds")
    }
    machine, record = stored["machine"], stored["record"]
    rows = [
        ["runs", str(sum(runs.values()))],
        ["training", f"{amount(totals['seconds'])} s for {amount(totals['steps'])} steps"],
        ["sampled for training", f"{totals['tokens'] / MEGA:.2f} million tokens"],
    ]
    if record:
        rows.append(["with loading, evaluation and logging", f"{amount(record['wall_seconds'])} s"])
    rows += [
        ["machine", f"{machine['cpu']}, {machine['cores']} of {machine['cores_of_all']} cores, "
                    f"{machine['memory_gib']} GiB, {machine['system']}"],
        ["software", ", ".join([f"Python {machine['python']}", *(f"{k} {v}" for k, v in machine["versions"].items())])],
    ]  # fmt: skip
    if record:
        rows.append(["commit of the runs", f"`{record['commit']}`"])
    return [Table(["", ""], rows)]


def curve(stored: Mapping[str, Any], yardstick: str) -> list[Block]:
    """A yardstick at every evaluation, means over seeds."""
    if yardstick not in stored["curves"]:
        raise LookupError(f"no curve of {yardstick!r}; there are {', '.join(stored['curves'])}")
    return [_course(stored["curves"][yardstick], f"{describe(yardstick).axis} at step", None)]


def training(stored: Mapping[str, Any], what: str) -> list[Block]:
    """What training logs, at some steps, of some objectives: `train/entropy at 1 10 of A; B`; means over seeds."""
    name, _, rest = what.partition(" at ")
    steps, _, chosen = rest.partition(OF)
    found = stored["record"].get("training", {}).get(name)
    if found is None:
        raise LookupError(f"no {name!r} of training steps is stored")
    wanted = [variant.strip() for variant in chosen.split(";") if variant.strip()] or list(found)
    if unknown := [variant for variant in wanted if variant not in found]:
        raise LookupError(f"no {', '.join(map(repr, unknown))} among {', '.join(found)}")
    return [_course({variant: found[variant] for variant in wanted}, f"`{name}` at step", steps.split())]


def figure(stored: Mapping[str, Any], which: str) -> list[Block]:
    """A figure with its caption, `curves accuracy`."""
    kind, _, yardstick = which.partition(" ")
    if f"{kind}_{yardstick}" not in FIGURES:
        raise LookupError(f"no figure {which!r}; there are {', '.join(name.replace('_', ' ', 1) for name in FIGURES)}")
    caption = CAPTIONS[kind].format(describe(yardstick).title)
    return [
        Text(f"![{caption.partition(':')[0]}](docs/results_{stored['name']}_{kind}_{yardstick}.png)"),
        Text(caption),
    ]


KINDS: dict[str, Callable[[Mapping[str, Any], str], list[Block]]] = {
    "setting": setting, "ranking": ranking, "ties": ties, "pairs": pairs, "costs": costs, "equal-cost": equal_cost,
    "compute": compute, "curve": curve, "training": training, "figure": figure,
}  # fmt: skip


def _course(by_variant: Mapping[str, Mapping[str, float]], title: str, steps: Sequence[str] | None) -> Table:
    shown = steps or list(dict.fromkeys(step for course in by_variant.values() for step in course))
    rows = [
        [_code(variant), *(f"{course[step]:.3g}" if step in course else "" for step in shown)]
        for variant, course in by_variant.items()
    ]
    return Table([title, *shown], rows)


def _named(entries: Sequence[Mapping[str, Any]], yardstick: str) -> Mapping[str, Any]:
    for entry in entries:
        if entry["yardstick"] == yardstick:
            return entry
    raise LookupError(f"no {yardstick!r}; there are {', '.join(entry['yardstick'] for entry in entries)}")


def _ranking(stored: Mapping[str, Any], yardstick: str) -> Mapping[str, Any]:
    return _named(stored["rankings"], yardstick)


def _pair(found: Mapping[str, Any], first: str, second: str) -> tuple[Mapping[str, Any], bool]:
    """The pair, and whether it is stored the other way round."""
    for pair in found["pairs"]:
        if {pair["first"], pair["second"]} == {first, second}:
            return pair, pair["first"] == second
    raise LookupError(f"no pair {first!r}{VERSUS}{second!r} in {found['yardstick']}")


def _verdict(pair: Mapping[str, Any]) -> str:
    for name in (pair["first"], pair["second"]):
        if pair["verdict"].startswith(f"{name} is "):
            return f"{_code(name)}{pair['verdict'].removeprefix(name)}"
    return pair["verdict"]


def _difference(pair: Mapping[str, Any], turned: bool = False) -> str:
    found = pair["difference"]
    if not turned:
        return _interval(found)
    low, high = (None if end is None else -end for end in (found["high"], found["low"]))
    return _interval(found | {"mean": -found["mean"], "low": low, "high": high})


def _mean(row: Mapping[str, Any]) -> str:
    return _interval(row["mean"])


def _interval(found: Mapping[str, Any]) -> str:
    return interval(Mean(found["mean"], found["low"], found["high"], found["seeds"], 0, "", ""))


def _code(name: str) -> str:
    return f"`{name}`"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
