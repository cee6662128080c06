"""From runs to results: medians, ratios pair by pair, a table, and the machine they are of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.benchmark.phases import SPLIT

WARM_UP = 2  # steps that are not counted: memory is mapped and kernels are chosen in them
PACKAGES = ("lit_opd", "torch", "lightning", "transformers", "trl")
COLUMNS = {
    "step_s": ("s / step", ".2f"),
    **{name: (name.removesuffix("_s"), ".2f") for name in (*SPLIT, "other_s")},
    "tokens_per_s": ("tokens / s", ".1f"),
    "completions_per_s": ("completions / s", ".2f"),
    "length": ("mean length", ".1f"),
    "reverse_kl": ("reverse KL", ".3f"),
    "peak_mb": ("peak RSS, MB", ".0f"),
    "imports_mb": ("of it imports", ".0f"),
    "over_limit": ("time / limit", ".2f"),
}
HEAD_COLUMNS = {"seconds": ("seconds", ".3f"), "working_mib": ("working MiB", ".0f"), "loss": ("loss", ".5f")}


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        what: the command.
        steps: of a run; of W3, timed runs of a case.
        rounds: runs of every side.
        out: folder of the results.
        quick: only the smallest sizes; of gpu, few repetitions.
        tiny: of gpu, sizes that a CPU can do.
        paths: of gpu, `optim.paths` of ours.
    """

    what: str
    steps: int
    rounds: int
    out: Path
    quick: bool = False
    tiny: bool = False
    paths: str = "auto"

    def write(self, results: dict[str, Any], text: str) -> None:
        """Write the results as JSON and the text that goes with them as Markdown, and print it."""
        path = self.out / f"benchmark_{self.what}"
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
        print(f"\n{text}\nwrote {path}.json and .md")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu_name(), "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "commit": _commit(), "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def summarise(run: dict[str, Any]) -> dict[str, Any]:
    """Medians over the counted steps of a run; `length` is the mean over all their completions.

    Args:
        run: `side`, `round`, and what its process answered.

    Returns:
        A row: the same with `steps` as their number and every name of `COLUMNS` that can be told; a run that failed
        stays as it is.
    """
    if "failed" in run:
        return run
    steps = [_complete(step) for step in run["steps"][WARM_UP:]]
    names = [name for name in (*COLUMNS, "tokens") if any(name in step for step in steps)]
    medians = {name: statistics.median(float(step.get(name, 0.0)) for step in steps) for name in names}
    tokens, completions = (sum(step[name] for step in steps) for name in ("tokens", "completions"))
    return run | medians | {"length": tokens / completions, "steps": len(steps)}


def _complete(step: dict[str, float]) -> dict[str, float]:
    rates = {f"{name}_per_s": step[name] / step["step_s"] for name in ("tokens", "completions")}
    return step | rates | {"other_s": step["step_s"] - sum(step.get(name, 0.0) for name in SPLIT)}


def pair_ratios(rows: Sequence[dict[str, Any]], over: str, under: str, name: str) -> list[float | None]:
    """Of every round that both sides ran, what one took over what the other took; None where one of them failed."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["side"] in (over, under):
            found.setdefault(row["round"], {})[row["side"]] = row.get(name)
    pairs = [(pair[over], pair[under]) for _, pair in sorted(found.items()) if len(pair) == 2]
    return [None if a is None or b is None else a / b for a, b in pairs]


def describe_ratios(ratios: Sequence[float | None]) -> str:
    """The median and, where there are several, every one of them."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "no pair came to an end"
    text = ", ".join("failed" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    return f"{statistics.median(known):.2f} (pair by pair: {text})"


def table(rows: Iterable[dict[str, Any]], first: Sequence[str], columns: dict[str, tuple[str, str]]) -> str:
    """A Markdown table.

    Args:
        rows: a row with `failed` shows why in place of its numbers.
        first: names of the columns that say what a row is of.
        columns: title and format by name; those that no row has are left out.
    """
    rows = list(rows)
    shown = {name: column for name, column in columns.items() if any(row.get(name) is not None for row in rows)}
    lines = [[*first, *(title for title, _ in shown.values())], ["---"] * (len(first) + len(shown))]
    for row in rows:
        cells = [str(row[name]) for name in first]
        if "failed" in row:
            blanks = [""] * (len(shown) - 1)
            lines.append([*cells, f"failed: {_one_cell(row['failed'])}", *blanks])
        else:
            values = [(row.get(name), form) for name, (_, form) in shown.items()]
            lines.append([*cells, *("" if value is None else format(value, form) for value, form in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _one_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def by_side(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median over its runs of every side, and after them the runs that failed."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            sides.setdefault(row["side"], []).append(row)
    found = []
    for side, runs in sides.items():
        names = [name for name in (*COLUMNS, "tokens") if all(isinstance(run.get(name), float) for run in runs)]
        found.append({"side": side, "runs": len(runs)} | {n: statistics.median(run[n] for run in runs) for n in names})
    return found + [row | {"runs": f"round {row['round']}"} for row in rows if "failed" in row]


def describe_machine(found: dict[str, Any]) -> str:
    """The machine in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, {found['system']}\n"
        f"Python {found['python']}, {versions}; commit {found['commit']}\n"
    )
