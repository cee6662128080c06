"""Write a report to read: one Markdown text, and one page of HTML made of it that needs no other file.

`command` calls `write_report` and prints `to_summary`. `tools/make_results.py` shares the tables and the numbers.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from lit_opd.files import write_file
from lit_opd.lab.compare.curves import draw_curves
from lit_opd.lab.compare.digest import SPENDINGS, EqualCost, Report, to_json
from lit_opd.lab.compare.paired import CONFIDENCE, Mean
from lit_opd.lab.compare.standings import Ranking
from lit_opd.measures.table import describe

__all__ = ["amount", "capital", "code", "interval", "probability", "table", "to_html", "to_markdown", "to_summary",
           "turned", "write_report"]  # fmt: skip

FIGURES = "figures"
LEVEL = f"[{100 * CONFIDENCE:g} %]"
NUMBER = re.compile(r"[-<]?[\d.,e+-]+( \[.*\])?")
# Colours are the reader's own, light or dark; lines and grounds are shades that show on both.
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
table { border-collapse: collapse; font-size: .875rem; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
td[style], td code { white-space: nowrap; } code { background: #8882; padding: 0 .25em; border-radius: 3px; }
img { max-width: 100%; width: 800px; height: auto; background: #fff; }
"""
READING = """
- Differences are paired: at the same seed, which means the same training prompts and uniform numbers, and on the same
  validation prompt.
- Intervals and p are Student's, over seeds and over prompts, joined so that they rather cover too much; they hold for
  other seeds and other prompts. Where variants share one seed only, they say nothing about other seeds.
- p is corrected for the number of pairs on that yardstick (Holm), not for the number of yardsticks: choose one before
  looking. Not distinguishable does not mean equal: the interval says how large a difference may be.
- Every validation prompt counts once. Curves, and values at equal cost, count every token once, so that both may differ
  where long completions differ from short ones.
- Values at equal cost have the seed as their unit and speak of these prompts only. They are read off between
  evaluations, never beyond them.
"""


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` with its `figures/`, and `report.html`, which needs no other file."""
    text, pictures = to_markdown(report)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for file, picture in pictures.items():
        write_file(folder / file, picture)
    write_file(folder / "report.md", text)
    write_file(folder / "report.html", to_html(text, pictures))
    write_file(folder / "report.json", json.dumps(to_json(report), indent=1, allow_nan=False) + "\n")


def to_summary(report: Report) -> str:
    """Say what may be concluded of every yardstick with a direction, a line each, and which runs are left out."""
    lines = [f"{ranking.yardstick}: {ranking.sentence}" for ranking in _split(report)[0]]
    return "\n".join(lines + [f"left out: {out.variant} with seed {out.seed}, {out.why}" for out in report.left_out])


def to_html(text: str, pictures: Mapping[str, bytes]) -> str:
    """Render Markdown as one page with everything in it, where tags in the text are shown and not obeyed."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for file, picture in pictures.items():
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"')
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def to_markdown(report: Report) -> tuple[str, dict[str, bytes]]:
    """Write all that a report says, in order, and draw the pictures that it names, as PNG by file."""
    ranked, others = _split(report)
    pictures: dict[str, bytes] = {}
    told = "\n".join(f"- {capital(describe(ranking.yardstick).title)}: {ranking.sentence}" for ranking in ranked)
    parts = ["# Comparison", told or "No run has finished: there is nothing to compare yet.", *_compared(report)]
    for ranking in ranked:
        parts += _yardstick(report, ranking, pictures)
    if ranked:
        header = ["variant", "steps", "sampled tokens", "seconds of training", "peak memory, MB"]
        costs = [(cost.variant, cost.steps, cost.tokens, cost.seconds, cost.peak_memory_mb) for cost in report.costs]
        parts += ["## What it cost", table(header, [[code(name), *map(amount, spent)] for name, *spent in costs])]
    if others:
        parts += ["## Also measured", "No direction of these is good by itself; they are not ranked."]
        parts += [part for ranking in others for part in _described(ranking)]
    parts += [part for ranking in report.rankings if ranking.pairs for part in _pairs(ranking)]
    return "\n\n".join([*parts, "## How to read this", READING.strip()]) + "\n", pictures


def _split(report: Report) -> tuple[list[Ranking], list[Ranking]]:
    """Part the yardsticks with a direction from those without."""
    ranked = [ranking for ranking in report.rankings if describe(ranking.yardstick).better]
    return ranked, report.rankings[len(ranked) :]


def _compared(report: Report) -> Iterable[str]:
    yield "## What was compared"
    yield table(["", ""], [
        ["variants", ", ".join(map(code, report.variants))],
        ["seeds", ", ".join(map(str, report.seeds))],
        ["validation prompts", str(report.prompts)],
        ["variants differ in", ", ".join(map(code, report.differing)) or "nothing that is recorded"],
        ["budget of a run", report.budget or "not told"],
        ["level", f"{100 * CONFIDENCE:g} % intervals, tests at {100 * (1 - CONFIDENCE):.3g} %"],
    ])  # fmt: skip
    if report.left_out:
        yield "Runs that are not, or not fully, in the statistics:"
        rows = [[code(run.variant), str(run.seed), run.status, run.why, run.run_id] for run in report.left_out]
        yield table(["variant", "seed", "status", "why", "run"], rows)


def _yardstick(report: Report, ranking: Ranking, pictures: dict[str, bytes]) -> Iterable[str]:
    name, title = ranking.yardstick, describe(ranking.yardstick).title
    yield f"## {capital(title)}"
    yield from _described(ranking)
    if equals := [equal for equal in report.equal_costs if equal.ranking.yardstick == name]:
        yield "At equal cost, the most that every run has spent (curves between evaluations are taken as straight):"
        yield _equal_costs(equals)
    if drawn := draw_curves(report.curves, report.variants, name):
        pictures[f"{FIGURES}/curves_{name}.png"] = drawn
        yield f"![Learning curves of {title}]({FIGURES}/curves_{name}.png)"
        yield f"Learning curves of {title}: means over seeds, bands from the least seed to the most."


def _described(ranking: Ranking) -> Iterable[str]:
    described = describe(ranking.yardstick)
    yield f"{described.axis}{f'; {described.better} is better' if described.better else ''}. {ranking.sentence}"
    against = {pair.second: pair for pair in ranking.pairs if pair.first == ranking.rows[0].variant}
    rows = []
    for row in ranking.rows:
        pair = against.get(row.variant)
        found = ["", ""] if pair is None else [interval(turned(pair.difference)), probability(pair.corrected_p)]
        rows.append([code(row.variant), interval(row.mean), *found, row.standing, str(row.mean.seeds)])
    difference = f"difference to {'best' if described.better else 'lowest'} {LEVEL}"
    yield table(["variant", f"mean {LEVEL}", difference, "corrected p", "verdict", "seeds"], rows)


def _equal_costs(equals: Sequence[EqualCost]) -> str:
    cells = [{row.variant: [interval(row.mean), row.standing] for row in equal.ranking.rows} for equal in equals]
    variants = dict.fromkeys(variant for column in cells for variant in column)
    rows = [[code(name), *(cell for column in cells for cell in column.get(name, ["", ""]))] for name in variants]
    header = [(f"at {amount(equal.budget)} {SPENDINGS[equal.cost]}", "verdict") for equal in equals]
    return table(["variant", *(cell for two in header for cell in two)], rows)


def _pairs(ranking: Ranking) -> Iterable[str]:
    rows = []
    for pair in ranking.pairs:
        numbers = [interval(pair.difference), probability(pair.p), probability(pair.corrected_p)]
        rows.append([code(pair.first), code(pair.second), *numbers, pair.verdict, str(pair.difference.seeds)])
    yield f"## Every pair: {describe(ranking.yardstick).title}"
    yield table(["first", "second", f"first - second {LEVEL}", "p", "corrected p", "verdict", "seeds"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, columns of numbers aligned to the right."""
    columns = [[row[place] for row in rows if row[place]] for place in range(len(header))]
    lines = ["---:" if cells and all(map(NUMBER.fullmatch, cells)) else "---" for cells in columns]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, lines, *rows]
    )


def code(name: str) -> str:
    """Write a name as code, so that Markdown leaves it alone."""
    return f"`{name}`"


def capital(text: str) -> str:
    """Begin a sentence with a text."""
    return text[:1].upper() + text[1:]


def turned(found: Mean) -> Mean:
    """Turn a difference round: second minus first."""
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return Mean(-found.mean, low, high, found.seeds, found.prompts)


def interval(found: Mean) -> str:
    """Write a mean and its interval, to two digits of the interval's width.

    >>> interval(Mean(0.12345, 0.1001, 0.1468, 3, 40))
    '0.123 [0.100, 0.147]'
    """
    if found.low is None or found.high is None:
        return f"{found.mean:.4g}"
    width = found.high - found.low
    # Adding zero turns a minus zero into a plain one.
    if not width > 0:
        return f"{found.mean + 0.0:.4g} [{found.low + 0.0:.4g}, {found.high + 0.0:.4g}]"
    decimals = min(12, max(0, 1 - math.floor(math.log10(width))))
    centre, low, high = (round(value, decimals) + 0.0 for value in (found.mean, found.low, found.high))
    return f"{centre:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def probability(p: float) -> str:
    """Write a p-value, e.g. `0.032`, `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float | None) -> str:
    """Write a cost, e.g. `12,345` or `0.482`, or nothing where it was not recorded."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
