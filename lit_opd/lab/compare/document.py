"""A report as pages to read: what is said and in which order, written as Markdown, HTML and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from lit_opd.lab.compare.accounting import COSTS
from lit_opd.lab.compare.blocks import Block, Details, Heading, Items, Picture, Table, Text, html_page, markdown_page
from lit_opd.lab.compare.figures import draw_curves, draw_differences, draw_pareto
from lit_opd.lab.compare.ranking import Pair, Ranking
from lit_opd.lab.compare.report import EqualCost, Report, to_json
from lit_opd.lab.compare.statistics import OTHER_PROMPTS, OTHER_RUNS, Difference, Mean
from lit_opd.lab.compare.words import CROSSED, EXPLANATIONS, ONE_SEED, amount, interval, probability
from lit_opd.measures.table import describe

__all__ = ["document", "to_html", "to_markdown", "to_summary", "write_report"]

FIGURES = "figures"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, `report.md` with its `figures/`, and `report.html`, which needs no other file.

    Args:
        report: to write.
        folder: made where it does not exist.

    Returns:
        The files.
    """
    blocks = document(report)
    texts = {
        "report.json": json.dumps(to_json(report), indent=1, allow_nan=False) + "\n",
        "report.md": markdown_page(blocks, FIGURES), "report.html": html_page(blocks),
    }  # fmt: skip
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    pictures = [block for block in blocks if isinstance(block, Picture)]
    for picture in pictures:
        (folder / FIGURES / f"{picture.name}.png").write_bytes(picture.png)
    return [*(folder / name for name in texts), *(folder / FIGURES / f"{picture.name}.png" for picture in pictures)]


def to_markdown(report: Report) -> str:
    """The report in Markdown; its figures are expected in the folder `figures`."""
    return markdown_page(document(report), FIGURES)


def to_html(report: Report) -> str:
    """The report as one page of HTML with everything in it."""
    return html_page(document(report))


def to_summary(report: Report) -> str:
    """What may be concluded of every yardstick with a direction, a line each, and which runs are left out."""
    lines = [
        f"{ranking.yardstick}: {ranking.sentence}" for ranking in report.rankings if describe(ranking.yardstick).better
    ]
    return "\n".join(lines + [f"left out: {out.variant} with seed {out.seed}, {out.why}" for out in report.left_out])


def document(report: Report) -> list[Block]:
    """All that a report says, in order."""
    ranked = [ranking for ranking in report.rankings if describe(ranking.yardstick).better]
    others = [ranking for ranking in report.rankings if not describe(ranking.yardstick).better]
    blocks: list[Block] = [Heading(1, report.title)]
    if ranked:
        blocks.append(Items([f"{describe(ranking.yardstick).title}: {ranking.sentence}" for ranking in ranked]))
    else:
        blocks.append(Text("No run has finished: there is nothing to compare yet."))
    blocks += [Heading(2, "What was compared"), *_compared(report)]
    blocks += [block for ranking in ranked for block in _yardstick(report, ranking)]
    if ranked:
        blocks += [Heading(2, "What it cost"), _costs(report)]
    if others:
        blocks += [Heading(2, "Also measured"), Text("No direction of these is good by itself; they are not ranked.")]
        blocks += [block for ranking in others for block in _described(ranking, report.confidence)]
    return [*blocks, Heading(2, "How to read this"), Items(_explanations(report))]


def _compared(report: Report) -> Iterable[Block]:
    rows = [
        ["variants", ", ".join(f"`{variant}`" for variant in report.variants)],
        ["seeds", ", ".join(map(str, report.seeds))],
        ["validation prompts", str(report.prompts)],
        ["variants differ in", ", ".join(f"`{key}`" for key in report.differing) or "nothing that is recorded"],
        ["budget of a run", report.budget or "not told"],
        ["level", f"{100 * report.confidence:g} % intervals, tests at {100 * (1 - report.confidence):.3g} %"],
    ]
    yield Table(["", ""], rows)
    if report.left_out:
        yield Text("Runs that are not, or not fully, in the statistics:")
        header = ["variant", "seed", "status", "why", "run"]
        yield Table(header, [[f"`{r.variant}`", str(r.seed), r.status, r.why, r.run_id] for r in report.left_out])


def _yardstick(report: Report, ranking: Ranking) -> Iterable[Block]:
    name, described = ranking.yardstick, describe(ranking.yardstick)
    yield Heading(2, described.title[0].upper() + described.title[1:])
    yield from _described(ranking, report.confidence)
    if any(pair.first == ranking.rows[0].variant for pair in ranking.pairs):
        caption = f"Paired differences of {described.title} to `{ranking.rows[0].variant}`."
        yield Picture(f"differences_{name}", caption, draw_differences(ranking, report.confidence))
    yield from _equal_costs([equal for equal in report.equal_costs if equal.ranking.yardstick == name])
    if any(math.isfinite(p.value) for curve in report.curves if curve.yardstick == name for p in curve.points):
        caption = f"Learning curves of {described.title}: means over seeds, bands from the least to the most."
        yield Picture(f"curves_{name}", caption, draw_curves(report, name))
    fronts = [front for front in report.fronts if front.yardstick == name]
    if fronts:
        told = "; ".join(f"in {front.cost}: {', '.join(f'`{v}`' for v in front.variants)}" for front in fronts)
        caption = (
            f"Final {described.title} against cost. Bars go from the least seed to the most; beaten by none {told}."
        )
        yield Picture(f"pareto_{name}", caption, draw_pareto(report, name))


def _described(ranking: Ranking, confidence: float) -> Iterable[Block]:
    described, level = describe(ranking.yardstick), f"[{100 * confidence:g} %]"
    better = f"; {described.better} is better" if described.better else ""
    yield Text(f"{described.axis}{better}. {ranking.sentence}")
    against = {pair.second: pair for pair in ranking.pairs if pair.first == ranking.rows[0].variant}
    first = "best" if described.better else "lowest"
    header = [
        "variant", f"mean {level}", f"difference to {first} {level}", "corrected p", "verdict", "letters", "seeds",
    ]  # fmt: skip
    rows = []
    for row in ranking.rows:
        pair = against.get(row.variant)
        difference = ["", ""] if pair is None else [interval(_reversed(pair.difference)), probability(pair.corrected_p)]
        cells = [f"`{row.variant}`", interval(row.mean), *difference, row.standing, row.letters, str(row.mean.seeds)]
        rows.append(cells)
    yield Table(header, rows)
    if ranking.pairs:
        yield Details(f"All {len(ranking.pairs)} pairs", [_pairs(ranking.pairs, level)])


def _reversed(difference: Difference) -> Mean:
    low, high = (None if end is None else -end for end in (difference.high, difference.low))
    return Mean(-difference.mean, low, high, difference.seeds, difference.prompts, difference.method, difference.scope)


def _pairs(pairs: Sequence[Pair], level: str) -> Table:
    values = [f"first - second {level}", f"these runs {level}"]
    header = ["first", "second", *values, "p", "corrected p", "verdict", "seeds", "test"]
    rows = []
    for pair in pairs:
        found = pair.difference
        these = Mean(found.mean, found.runs_low, found.runs_high, found.seeds, found.prompts, "", "")
        rows.append(
            [f"`{pair.first}`", f"`{pair.second}`", interval(found), interval(these), probability(found.p),
             probability(pair.corrected_p), pair.verdict, str(found.seeds), found.p_method]
        )  # fmt: skip
    return Table(header, rows)


def _equal_costs(equals: Sequence[EqualCost]) -> Iterable[Block]:
    if not equals:
        return
    yield Text("At equal cost, the most that every run has spent (curves between evaluations are taken as straight):")
    variants = list(dict.fromkeys(row.variant for equal in equals for row in equal.ranking.rows))
    cells = [{row.variant: [interval(row.mean), row.letters] for row in equal.ranking.rows} for equal in equals]
    rows = []
    for variant in variants:
        rows.append([f"`{variant}`", *(cell for column in cells for cell in column.get(variant, ["", ""]))])
    header = ["variant"]
    for equal in equals:
        header += [f"at {amount(equal.budget)} {COSTS[equal.cost]}", "letters"]
    yield Table(header, rows)
    yield Items([f"At {amount(e.budget)} {COSTS[e.cost]}: {e.ranking.sentence}" for e in equals])


def _costs(report: Report) -> Table:
    header = ["variant", "steps", "sampled tokens", "seconds", "tokens / step", "seconds / step", "tokens / second",
              "peak memory, MB"]  # fmt: skip
    rows = []
    for cost in report.costs:
        rates = [(cost.tokens, cost.steps), (cost.seconds, cost.steps), (cost.tokens, cost.seconds)]
        totals = [amount(value) for value in (cost.steps, cost.tokens, cost.seconds)]
        shares = ["" if over is None or not under else amount(over / under) for over, under in rates]
        rows.append([f"`{cost.variant}`", *totals, *shares, amount(cost.peak_memory_mb)])
    return Table(header, rows)


def _explanations(report: Report) -> list[str]:
    scopes = {pair.difference.scope for ranking in report.rankings for pair in ranking.pairs}
    used = {CROSSED: OTHER_RUNS in scopes, ONE_SEED: OTHER_PROMPTS in scopes}
    return [" ".join(text.split()) for text in EXPLANATIONS if used.get(text, True)]
