"""Measure bias and variance on small models; `control`, `summary`, `growth` and `markov` say what is measured.

Usage: ``python tools/theory/run.py [--out docs] [--quick]``

The first three reproduce the theory of arXiv:2603.25562, the last maps registered estimators. Writes ``theory.json``,
all numbers, and the pictures ``theory_control.png``, ``theory_growth.png`` and ``theory_map.png``. Takes about six
minutes on one core. ``--quick`` takes seconds and shows that everything runs; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import figures
import growth
import map_figure
import markov
import summary
import torch
from control import Settings

LINE = 160
QUICK = Settings(
    gammas=(0.0, 1.0), seeds=(42, 43), horizon=4, batch=16, iterations=8, teacher_iterations=4, probe_every=2, fresh=32
)

QUICK_CHAIN = markov.Settings(vocabulary=10, horizon=4, group=2, groups=64)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the numbers and pictures")
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of sums, so the numbers, would depend on how many there are
    found = {
        "growth": growth.measure(),
        "control": summary.measure(QUICK if options.quick else Settings()),
        "map": markov.measure(QUICK_CHAIN if options.quick else markov.Settings()),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    figures.draw_growth(found["growth"], options.out / "theory_growth.png")
    figures.draw_control(found["control"]["main"], options.out / "theory_control.png")
    map_figure.draw_map(found["map"], options.out / "theory_map.png")
    (options.out / "theory.json").write_text(to_json(found) + "\n")
    print(f"wrote theory.json and three pictures to {options.out}")


def to_json(value: object, indent: str = "") -> str:
    """JSON with floats of four significant digits; what fits on a line is on one line."""
    inner = indent + " "
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        brackets, parts = "{}", [f"{json.dumps(str(key))}: {to_json(part, inner)}" for key, part in value.items()]
    elif isinstance(value, list | tuple):
        brackets, parts = "[]", [to_json(part, inner) for part in value]
    else:
        return json.dumps(value)
    line = brackets[0] + ", ".join(parts) + brackets[1]
    if len(indent + line) <= LINE and "\n" not in line:
        return line
    return f"{brackets[0]}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{brackets[1]}"


if __name__ == "__main__":
    main()
