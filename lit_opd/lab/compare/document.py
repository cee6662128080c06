"""Write a report to read: one Markdown text, and one page of HTML made of it that needs no other file.

Its first screen answers: one table, one figure, how it was made. The rest is folded. `command` calls `write_report` and
prints `to_summary`. `tools/make_results.py` shares the tables and the numbers.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from lit_opd.files import write_file
from lit_opd.lab.compare.analysis import (
    COLLAPSED,
    CONFIDENCE,
    EQUAL,
    WORSE,
    Analysis,
    Row,
)
from lit_opd.lab.compare.cells import amount, capital, code, interval, numbers, probability, table
from lit_opd.lab.compare.contrasts import ALL, TO_THE_BEST
from lit_opd.lab.compare.curves import draw_curves
from lit_opd.lab.compare.digest import SPENDINGS, EqualCost, Report, to_json
from lit_opd.lab.compare.dots import draw_seeds
from lit_opd.measures.table import describe

__all__ = ["at_equal_cost", "overview", "sentence", "setting", "to_html", "to_markdown", "to_summary", "to_text",
           "write_report"]  # fmt: skip

FIGURES = "figures"
MARKS = {"best": "★", EQUAL: "≈", COLLAPSED: "✗"}
LEGEND = "★ best · ≈ not told from the best · ✗ collapsed · no mark: worse than the best."
WITH_INTERVALS = 2  # yardsticks whose intervals stand in the first table
FOLD = re.compile(r"^<details><summary>(.*)</summary>$|^</details>$", re.MULTILINE)
LEVEL = f"[{100 * CONFIDENCE:g} %]"
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
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; } details { border-bottom: 1px solid #8884; }
"""
READING = """
- A yardstick that spans orders of magnitude (KLs, negative log-likelihoods) is compared by its logarithm: differences
  are logs of ratios, the mean of a variant is the geometric mean over its seeds.
- Seeds and prompts are crossed blocks: runs of one seed saw the same training prompts and uniform numbers, and all were
  measured on the same validation prompts. The error between seeds is pooled over the variants; one whose error is
  larger than that of the others keeps its own, which is then said.
- Intervals hold for other seeds and other prompts. Those of means stand each for itself. Verdicts, p and the intervals
  of differences are corrected for the contrasts that were asked on that yardstick, not for the number of yardsticks:
  choose one before looking. Not told from the best is no proof of being equal: see how wide the interval is.
- Collapsed: a run ended more than twice as bad as the untrained student, or not finite. Where the untrained student is
  not known: a run ended at least ten times as bad as each run of the best.
- In verdicts every validation prompt counts once. Curves, values at equal cost and those of the untrained student
  and of the teacher count every token once, so that both may differ where long completions differ from short ones.
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


def to_summary(metrics: Mapping[str, Analysis]) -> str:
    """Say what may be concluded of every yardstick with a direction, a line each."""
    return "\n".join(f"{name}: {sentence(found)}" for name, found in metrics.items() if found.better)


def sentence(found: Analysis) -> str:
    """Say what may be concluded of a yardstick."""
    if found.better is None:
        return "No direction of it is good, so nothing is ranked."
    names = {verdict: [code(row.variant) for row in found.rows if row.verdict == verdict]
             for verdict in ("best", EQUAL, WORSE, COLLAPSED)}  # fmt: skip
    fallen = f" Collapsed: {', '.join(names[COLLAPSED])}." * bool(names[COLLAPSED])
    if not names["best"]:
        return f"Every variant collapsed.{'' if names[COLLAPSED] else ' There is none.'}"
    best = names["best"][0]
    if len(found.rows) == 1:
        return f"{best} alone has finished runs: nothing is compared."
    if not any(contrast.low is not None for contrast in found.contrasts):
        return f"{best} has the best mean, and nothing can be tested: there is one value of each, or no error.{fallen}"
    if not names[EQUAL]:
        others = " and is told from each of the others" if names[WORSE] else ""
        return f"{best} is best{others}.{fallen}"
    worse = f"; worse: {', '.join(names[WORSE])}" * bool(names[WORSE])
    return f"{best} has the best mean; not told from it: {', '.join(names[EQUAL])}{worse}.{fallen}"


def to_html(text: str, pictures: Mapping[str, bytes]) -> str:
    """Render Markdown as one page with everything in it, where tags in the text are shown and not obeyed."""
    markdown, body, start = MarkdownIt("commonmark", {"html": False}).enable("table"), "", 0
    for fold in FOLD.finditer(text):  # the only tags that are meant
        body += markdown.render(text[start : fold.start()])
        summary = fold.group(1)
        body += "</details>\n" if summary is None else f"<details><summary>{html.escape(summary)}</summary>\n"
        start = fold.end()
    body += markdown.render(text[start:])
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
    pictures: dict[str, bytes] = {}
    parts = [f"# Comparison of {len(report.variants)} variants", *_first_screen(report, pictures)]
    for name, found in report.metrics.items():
        parts += _fold(capital(describe(name).title), _yardstick(report, name, found, pictures))
    parts += _fold("How to read this", [READING.strip()])
    return "\n\n".join(parts) + "\n", pictures


def _fold(title: str, parts: Iterable[str]) -> Iterable[str]:
    yield f"<details><summary>{title}</summary>"
    yield from parts
    yield "</details>"


def _first_screen(report: Report, pictures: dict[str, bytes]) -> Iterable[str]:
    yield overview(report)
    ranked = {name: found for name, found in report.metrics.items() if found.better}
    if drawn := draw_seeds(ranked, report.variants, report.untrained):
        pictures[f"{FIGURES}/seeds.png"] = drawn
        yield f"![Every seed of every variant]({FIGURES}/seeds.png)"
        yield "A dot a seed; bars are intervals of the means; the dashed line is the untrained student."
    if report.left_out:
        yield "Runs that are not, or not fully, in the statistics:"
        out = [[code(run.variant), str(run.seed), run.status, run.why, run.run_id] for run in report.left_out]
        yield table(["variant", "seed", "status", "why", "run"], out)
    yield "## How it was made"
    yield setting(report)


def overview(report: Report) -> str:
    """Write what was found in a sentence and a table, as Markdown."""
    ranked = {name: found for name, found in report.metrics.items() if found.better}
    if not ranked:
        return "No run has finished: there is nothing to compare yet."
    first, found = next(iter(ranked.items()))
    told = f"{capital(describe(first).title)}: {sentence(found)}"
    return "\n\n".join([told, _overview(report, ranked), f"{LEGEND} {LEVEL[1:-1]} intervals."])


def to_text(found: Analysis) -> str:
    """Write an analysis for a terminal: a line a variant, a line a contrast."""
    width = max(len(row.variant) for row in found.rows)
    lines = [f"  {row.variant:<{width}}  {interval(row)}  {row.verdict or ''}".rstrip() for row in found.rows]
    what = "ratio" if found.scale == "log" else "difference"
    lines += [f"  {what} of {one.a} to {one.b}: {numbers(one, found.scale == 'log')}, p {probability(one.p)}"
              for one in found.contrasts]  # fmt: skip
    return "\n".join(lines + [f"  {note}" for note in found.notes])


def _overview(report: Report, ranked: Mapping[str, Analysis]) -> str:
    """Show all variants on all yardsticks with a direction, and their costs, between teacher and untrained student."""
    costs = {cost.variant: cost for cost in report.costs}
    by_variant = {name: {row.variant: row for row in found.rows} for name, found in ranked.items()}
    order = list(dict.fromkeys([row.variant for found in ranked.values() for row in found.rows] + report.variants))
    header = ["variant", *(f"{describe(name).label}, {found.better} is better" for name, found in ranked.items())]
    header += ["sampled tokens", "seconds", "peak MB"]
    rows = [_reference("teacher", report.teacher, ranked)] if report.teacher else []
    for variant in order:
        cells = [_cell(by_variant[name].get(variant), place < WITH_INTERVALS) for place, name in enumerate(ranked)]
        cost = costs[variant]
        rows.append([code(variant), *cells, *map(amount, (cost.tokens, cost.seconds, cost.peak_memory_mb))])
    rows += [_reference("untrained student", report.untrained, ranked)] if report.untrained else []
    return table(header, rows)


def _reference(title: str, values: Mapping[str, float], ranked: Iterable[str]) -> list[str]:
    return [f"*{title}*", *(f"{values[name]:.3g}" if name in values else "" for name in ranked), "", "", ""]


def _cell(row: Row | None, with_interval: bool) -> str:
    if row is None:
        return ""
    mark = MARKS.get(row.verdict or "", "")
    value = "not finite" if row.mean is None else interval(row) if with_interval else f"{row.mean:.3g}"
    return f"{value} {mark}".strip()


def setting(report: Report) -> str:
    """Say how the runs were made and what was tested, as a table."""
    asked = {TO_THE_BEST: "each variant with the best", ALL: "every two variants"}
    return table(["", ""], [
        ["variants differ in", ", ".join(map(code, report.differing)) or "nothing that is recorded"],
        ["seeds", ", ".join(map(str, report.seeds))],
        ["validation prompts", str(report.prompts)],
        ["budget of a run", report.budget or "not told"],
        ["tested", asked.get(report.contrasts, f"each variant with {code(report.contrasts)}")],
        ["level", f"{100 * CONFIDENCE:g} % intervals, tests at {100 * (1 - CONFIDENCE):.3g} % of each yardstick"],
        *([title, value] for title, value in report.made.items()),
    ])  # fmt: skip


def _yardstick(report: Report, name: str, found: Analysis, pictures: dict[str, bytes]) -> Iterable[str]:
    described = describe(name)
    yield f"{described.axis}{f'; {described.better} is better' if described.better else ''}. {sentence(found)}"
    yield _means(found)
    if found.contrasts:
        yield "Differences, as ratios a / b:" if found.scale == "log" else "Differences, a - b:"
        yield _contrasts(found)
    yield from found.notes
    if equals := [equal for equal in report.equal_costs if equal.yardstick == name]:
        yield "At equal cost, the most that every run has spent (curves between evaluations are taken as straight):"
        yield at_equal_cost(equals)
    if described.better and (drawn := draw_curves(report.curves, report.variants, name)):
        pictures[f"{FIGURES}/curves_{name}.png"] = drawn
        yield f"![Learning curves of {described.title}]({FIGURES}/curves_{name}.png)"
        yield f"Learning curves of {described.title}: means over seeds, bands from the least seed to the most."


def _means(found: Analysis) -> str:
    header = ["variant", f"mean {LEVEL}", *(["verdict"] if found.better else []), "of each seed"]
    rows = [[code(row.variant), interval(row), *([row.verdict or ""] if found.better else []),
             ", ".join(f"{value:.3g}" for value in row.by_seed.values())] for row in found.rows]  # fmt: skip
    return table(header, rows)


def _contrasts(found: Analysis) -> str:
    rows = [[code(one.a), code(one.b), numbers(one, found.scale == "log"), probability(one.p), one.verdict]
            for one in found.contrasts]  # fmt: skip
    return table(["a", "b", f"{'a / b' if found.scale == 'log' else 'a - b'} {LEVEL}", "corrected p", "verdict"], rows)


def at_equal_cost(equals: Sequence[EqualCost]) -> str:
    """Write the means of variants at equal costs, a column a budget."""
    variants = dict.fromkeys(variant for equal in equals for variant in equal.values)
    rows = [[code(name), *(f"{equal.values[name]:.4g}" if name in equal.values else "" for equal in equals)]
            for name in variants]  # fmt: skip
    return table(["variant", *(f"at {amount(equal.budget)} {SPENDINGS[equal.cost]}" for equal in equals)], rows)
