"""Analyse results that were made elsewhere: a table of metric, variant, seed, prompt and value.

The command `compare --from-table` calls this. Each metric is analysed by itself, as those of a comparison are.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from lit_opd.errors import UserError
from lit_opd.lab.compare.analysis import Analysis, NotAboveZero, Rules, analyse
from lit_opd.lab.compare.contrasts import TO_THE_BEST, check_contrasts
from lit_opd.lab.compare.digest import rules_for
from lit_opd.measures.table import Better, Scale, in_order, look_up

__all__ = ["analyse_table"]

KEY = "--from-table"
COLUMNS = ("metric", "variant", "seed", "value")
PROMPT = "prompt"

Cells = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Metric -> variant -> seed -> prompt -> value."""


def analyse_table(
    file: Path, better: str | None = None, scale: str | None = None, contrasts: str = TO_THE_BEST
) -> dict[str, Analysis]:
    """Analyse every metric of a CSV file.

    Args:
        file: with the columns metric, variant, seed, value and, where there is one, prompt.
        better: `lower` or `higher`, for all its metrics; None takes what the table of measures says of each.
        scale: `raw` or `log`, likewise.
        contrasts: `best`, `all`, or the name of a variant as the baseline.

    Raises:
        UserError: a table that cannot be read or compared.
    """
    _check_choice("--better", better, get_args(Better))
    _check_choice("--scale", scale, get_args(Scale))
    cells = _read(file)
    return {name: _analysed(name, cells[name], better, scale, contrasts) for name in in_order(cells)}


def _check_choice(key: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UserError(key, " or ".join(allowed), repr(value), "Write one of them.")


def _analysed(
    name: str, cells: dict[str, dict[str, dict[str, float]]], better: str | None, scale: str | None, contrasts: str
) -> Analysis:
    rules = _rules(name, better, scale, contrasts)
    check_contrasts(contrasts, cells)
    values = {
        variant: {seed: _in_order(name, variant, seed, cells) for seed in runs} for variant, runs in cells.items()
    }
    try:
        return analyse(values, rules)
    except NotAboveZero as error:
        expected, remedy = f"values of {name!r} above 0 on a log scale", "Correct them, or set --scale raw."
        raise UserError(KEY, expected, "a run whose mean is not", remedy) from error


def _rules(name: str, better: str | None, scale: str | None, contrasts: str) -> Rules:
    measure = look_up(name)
    if measure is not None:
        rules = rules_for(measure, None, contrasts)
    elif better is None:
        remedy = "Set --better lower or --better higher."
        raise UserError(KEY, "metrics whose good direction is known", repr(name), remedy)
    else:
        rules = Rules(None, contrasts=contrasts)
    if better is not None:
        rules = replace(rules, better=better)  # type: ignore[arg-type]
    if scale is not None:
        rules = replace(rules, scale=scale)  # type: ignore[arg-type]
    return rules


def _in_order(name: str, variant: str, seed: str, cells: dict[str, dict[str, dict[str, float]]]) -> np.ndarray:
    """Take the values of a run in the order of the prompts, which are the same in all runs."""
    first = next(iter(next(iter(cells.values())).values()))
    found = cells[variant][seed]
    if found.keys() != first.keys():
        odd = sorted(found.keys() ^ first.keys())[0]
        told = f"prompt {odd!r} in some alone, as in {variant!r} with seed {seed}"
        raise UserError(KEY, f"the same prompts in all runs of {name!r}", told, "Complete the table.")
    return np.array([found[prompt] for prompt in first])


def _read(file: Path) -> Cells:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise UserError(KEY, f"the columns {', '.join(COLUMNS)}", found, f"Add {', '.join(missing)}.")
            cells: Cells = {}
            for number, (metric, variant, seed, prompt, value) in _rows(reader):
                run = cells.setdefault(metric, {}).setdefault(variant, {}).setdefault(seed, {})
                if prompt in run:
                    told = f"a second one in line {number}: {metric}, {variant}, {seed}, {prompt}".rstrip(", ")
                    raise UserError(KEY, "one value of each metric, variant, seed and prompt", told, "Remove one.")
                run[prompt] = value
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(KEY, "a CSV file", f"{file}: {error}", "Check it.") from error
    if not cells:
        raise UserError(KEY, "a line of results", f"none in {file}", "Add them.")
    return cells


def _rows(reader: csv.DictReader[str]) -> Iterator[tuple[int, tuple[str, str, str, str, float]]]:
    for row in reader:
        metric, variant, seed, value = ((row[name] or "").strip() for name in COLUMNS)
        for name, text in zip(COLUMNS, (metric, variant, seed, value), strict=True):
            if not text:
                raise UserError(KEY, f"a {name} in every line", f"none in line {reader.line_num}", "Fill it in.")
        try:
            number = float(value)
        except ValueError as error:
            remedy = "Write a number, or nan for a run that diverged."
            raise UserError(KEY, "numbers", f"{value!r} in line {reader.line_num}", remedy) from error
        # An infinite value is that of a run that diverged, too.
        prompt = (row.get(PROMPT) or "").strip()
        yield reader.line_num, (metric, variant, seed, prompt, number if math.isfinite(number) else math.nan)
