"""Write what stands between the markers of RESULTS.md, each block made of the stored numbers of one comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_opd.lab.compare.paired import Mean

from lit_opd.lab.compare.digest import SPENDINGS
from lit_opd.lab.compare.document import amount, capital, code, interval, probability, table, turned
from lit_opd.measures.table import describe

VERSUS, OF = " vs ", " of "
DRAWN = ("accuracy", "reverse_kl", "student_entropy")
MEGA = 1e6

Stored = Mapping[str, Any]


def block(what: str, stored: Stored) -> str:
    """Write the Markdown of a block.

    Args:
        what: of the marker: a name of `KINDS`, and what it takes.
        stored: numbers of the comparison, by `store.trim`.

    Raises:
        LookupError: no such block, or the comparison does not hold what it shows; the message says which.
    """
    kind, _, rest = what.partition(" ")
    if kind not in KINDS:
        raise LookupError(f"there is no block {kind!r}; there are {', '.join(KINDS)}")
    return "\n\n".join(KINDS[kind](stored, rest.strip()))


def setting(stored: Stored, _: str) -> list[str]:
    """Say what was compared, and which runs are missing."""
    level = 100 * stored["confidence"]
    rows = [
        ["objectives", str(len(stored["variants"]))],
        ["seeds", ", ".join(map(str, stored["seeds"]))],
        ["steps of a run", amount(max(cost["steps"] for cost in stored["costs"]))],
        ["held-out prompts", str(stored["prompts"])],
        ["level", f"{level:g} % intervals, tests at {100 - level:.3g} %"],
        ["runs that did not finish", str(len(stored["left_out"]) or "none")],
    ]
    out = [[code(run["variant"]), str(run["seed"]), run["why"]] for run in stored["left_out"]]
    return [table(["", ""], rows), *([table(["left out", "seed", "why"], out)] if out else [])]


def ranking(stored: Stored, yardstick: str) -> list[str]:
    """Show all objectives on one yardstick, in order."""
    found, described = _named(stored["rankings"], yardstick), describe(yardstick)
    against = {pair["second"]: pair for pair in found["pairs"] if pair["first"] == found["rows"][0]["variant"]}
    rows = []
    for row in found["rows"]:
        pair = against.get(row["variant"])
        rest = ["", ""] if pair is None else [_difference(pair, swap=True), probability(pair["corrected_p"])]
        rows.append([code(row["variant"]), interval(_mean(row["mean"])), *rest, row["standing"]])
    level, first = _level(stored), "best" if described.better else "lowest"
    header = [
        f"{described.title}, {described.unit} {level}",
        f"difference to {first} {level}",
        "corrected p",
        "verdict",
    ]
    seeds = sorted({row["mean"]["seeds"] for row in found["rows"]})
    better = f"{described.better} is better" if described.better else "no direction is good by itself"
    told = f"{capital(described.title)}: {better}; {' or '.join(map(str, seeds))} seeds each. {found['sentence']}"
    return [told, table(["objective", *header], rows)]


def ties(stored: Stored, yardstick: str) -> list[str]:
    """List the pairs that could not be told apart."""
    found, title = _named(stored["rankings"], yardstick), describe(yardstick).title
    tied = [pair for pair in found["pairs"] if not pair["distinguishable"]]
    told = f"{capital(title)}: {len(tied)} of {len(found['pairs'])} pairs could not be told apart."
    if not tied:
        return [told]
    rows = [[code(pair["first"]), code(pair["second"]), _difference(pair), probability(pair["corrected_p"])]
            for pair in tied]  # fmt: skip
    summary = f"<details><summary>The {len(tied)} pairs not told apart in {title}</summary>"
    return [
        told,
        summary,
        table(["first", "second", f"first - second {_level(stored)}", "corrected p"], rows),
        "</details>",
    ]


def pairs(stored: Stored, wanted: str) -> list[str]:
    """Show chosen pairs, `A vs B; C vs D`, on every yardstick."""
    rows = []
    for names in wanted.split(";"):
        first, _, second = names.strip().partition(VERSUS)
        for found in stored["rankings"]:
            pair = next((pair for pair in found["pairs"] if {pair["first"], pair["second"]} == {first, second}), None)
            if pair is None:
                raise LookupError(f"no pair {first!r}{VERSUS}{second!r} in {found['yardstick']}")
            shown = [_difference(pair, swap=pair["first"] == second), probability(pair["corrected_p"]), pair["verdict"]]
            rows.append([f"{code(first)} - {code(second)}", describe(found["yardstick"]).title, *shown])
    return [table(["pair", "yardstick", f"difference {_level(stored)}", "corrected p", "verdict"], rows)]


def costs(stored: Stored, _: str) -> list[str]:
    """Show what a run of each objective took."""
    header = ["objective", "tokens", "seconds", "tokens / step", "s / step", "tokens / s", "peak MB"]
    rows = []
    for cost in sorted(stored["costs"], key=lambda cost: (cost["seconds"] is None, cost["seconds"])):
        rates = [(cost["tokens"], cost["steps"]), (cost["seconds"], cost["steps"]), (cost["tokens"], cost["seconds"])]
        shares = [amount(over / under) if over is not None and under else "" for over, under in rates]
        totals = [amount(cost["tokens"]), amount(cost["seconds"])]
        rows.append([code(cost["variant"]), *totals, *shares, amount(cost["peak_memory_mb"])])
    return [table(header, rows)]


def equal_cost(stored: Stored, yardstick: str) -> list[str]:
    """Show the objectives at equal tokens and at equal seconds, and which pairs can be told apart there."""
    found = _named(stored["equal_costs"], yardstick)
    budgets = {f"{amount(found[kind]['budget'])} {SPENDINGS[kind]}": found[kind] for kind in SPENDINGS if kind in found}
    columns = [{row["variant"]: [interval(_mean(row["mean"])), row["standing"]] for row in at["rows"]}
               for at in budgets.values()]  # fmt: skip
    header = ["objective", *(cell for budget in budgets for cell in (f"at {budget}", "verdict"))]
    variants = dict.fromkeys(variant for column in columns for variant in column)
    rows = [[code(v), *(cell for column in columns for cell in column.get(v, ["", ""]))] for v in variants]
    out = ", ".join(map(code, found["left_out"]))
    told = f"{capital(describe(yardstick).title)} at equal cost, the most that every run has spent."
    told += f" Left out, for less than half of the median's tokens: {out}." if out else ""
    return [told, table(header, rows), "\n".join(f"- At {budget}, {_apart(at)}" for budget, at in budgets.items())]


def compute(stored: Stored, _: str) -> list[str]:
    """Add up what all runs took together, and say on what."""
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
        ["with loading, evaluation and logging", f"{amount(record['wall_seconds'])} s"] if record else [],
        ["machine", f"{machine['cpu']}, {machine['cores']} of {machine['cores_of_all']} cores, "
                    f"{machine['memory_gib']} GiB, {machine['system']}"],
        ["software", ", ".join([f"Python {machine['python']}", *(f"{k} {v}" for k, v in machine["versions"].items())])],
        ["commit of the runs", code(record["commit"])] if record else [],
    ]  # fmt: skip
    return [table(["", ""], [row for row in rows if row])]


def curve(stored: Stored, yardstick: str) -> list[str]:
    """Show a yardstick at every evaluation, means over seeds."""
    if yardstick not in stored["curves"]:
        raise LookupError(f"no curve of {yardstick!r}; there are {', '.join(stored['curves'])}")
    return [_course(stored["curves"][yardstick], f"{describe(yardstick).axis} at step", None)]


def training(stored: Stored, what: str) -> list[str]:
    """Show what training logs, at some steps, of some objectives: `train/entropy at 1 10 of A; B`; means over seeds."""
    name, _, rest = what.partition(" at ")
    steps, _, chosen = rest.partition(OF)
    found = stored["record"].get("training", {}).get(name)
    if found is None:
        raise LookupError(f"no {name!r} of training steps is stored")
    wanted = [variant.strip() for variant in chosen.split(";") if variant.strip()] or list(found)
    if unknown := [variant for variant in wanted if variant not in found]:
        raise LookupError(f"no {', '.join(map(repr, unknown))} among {', '.join(found)}")
    return [_course({variant: found[variant] for variant in wanted}, f"`{name}` at step", steps.split())]


def figure(stored: Stored, which: str) -> list[str]:
    """Show the learning curves of a yardstick, `curves accuracy`."""
    kind, _, yardstick = which.partition(" ")
    if kind != "curves" or yardstick not in DRAWN:
        raise LookupError(f"no figure {which!r}; there are {', '.join(f'curves {name}' for name in DRAWN)}")
    caption = f"Learning curves of {describe(yardstick).title}"
    image = f"![{caption}](docs/results_{stored['name']}_curves_{yardstick}.png)"
    return [image, f"{caption}: means over seeds, bands from the least seed to the most."]


KINDS: dict[str, Callable[[Stored, str], list[str]]] = {
    "setting": setting, "ranking": ranking, "ties": ties, "pairs": pairs, "costs": costs, "equal-cost": equal_cost,
    "compute": compute, "curve": curve, "training": training, "figure": figure,
}  # fmt: skip


def _course(by_variant: Mapping[str, Mapping[str, float]], title: str, steps: Sequence[str] | None) -> str:
    shown = steps or list(dict.fromkeys(step for course in by_variant.values() for step in course))
    rows = [
        [code(variant), *(f"{course[step]:.3g}" if step in course else "" for step in shown)]
        for variant, course in by_variant.items()
    ]
    return table([title, *shown], rows)


def _named(entries: Sequence[Stored], yardstick: str) -> Stored:
    for entry in entries:
        if entry["yardstick"] == yardstick:
            return entry
    raise LookupError(f"no {yardstick!r}; there are {', '.join(entry['yardstick'] for entry in entries)}")


def _apart(found: Stored) -> str:
    """Say which pairs can be told apart, of how many."""
    worse: dict[str, list[str]] = {}
    for first, second in found["apart"]:
        worse.setdefault(code(first), []).append(code(second))
    n = len(found["rows"])
    told = "; ".join(f"{first} from {', '.join(names)}" for first, names in worse.items())
    return f"{len(found['apart'])} of {n * (n - 1) // 2} pairs can be told apart{f': {told}' if told else ''}."


def _difference(pair: Stored, swap: bool = False) -> str:
    found = _mean(pair["difference"])
    return interval(turned(found) if swap else found)


def _mean(found: Stored) -> Mean:
    return Mean(found["mean"], found["low"], found["high"], found["seeds"], 0)


def _level(stored: Stored) -> str:
    return f"[{100 * stored['confidence']:g} %]"
