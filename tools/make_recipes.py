"""Write the page of the published recipes, and README's table of some, from their heads and recorded runs.

Usage, from the root of the repository: ``python -m tools.make_recipes [--run] [--check]``. With ``--run`` every recipe
without a record, or whose file has changed since, is trained on the tiny pair as it stands, once a seed, and recorded
in ``conf/recipes/results.json``: three quarters of a minute a run on one CPU core, those of README's table first. With
``--check``, as in ``tests/test_recipes.py``, nothing is written, and the exit code tells if something would change.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lit_opd.commands.recipes import Recipe, all_recipes
from lit_opd.measures.intervals import over_prompts

ROOT = Path(__file__).parents[1]
PAGE, RECORDS, README = ROOT / "conf/recipes/README.md", ROOT / "conf/recipes/results.json", ROOT / "README.md"
SEEDS = (0, 1, 2)
SHOWN = ("accuracy", "reverse_kl")
# What changes no weight: a slower run would end with the same ones.
FAST = (
    "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "evaluation.num_examples=0",
    "evaluation.batch_size=256", "evaluation.teacher=false", "evaluation.every_n_steps=1000",
    "diagnostics.every_n_steps=0", "diagnostics.figures=false", "tracking.system_metrics=false",
)  # fmt: skip
# What made on-policy distillation known, in README's words.
KNOWN = {
    "thinking_machines": "Thinking Machines, blog of October 2025",
    "qwen3": "Qwen3, strong to weak",
    "mimo_v2_flash": "MiMo-V2-Flash, MOPD",
    "glm5": "GLM-5, cross-stage",
    "paper_local_support_matching": "arXiv:2603.25562, local support matching",
}
MARKERS = ("<!-- recipes -->\n", "<!-- /recipes -->")


def main() -> int:
    """Train where it is asked for, then write both pages, or tell which are not as they would be written."""
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    if "--run" in sys.argv:
        run_all(records)
    tables = {PAGE: page_table(records), README: known()}
    written = {page: filled(page.read_text(), content) for page, content in tables.items()}
    changed = [page for page, text in written.items() if page.read_text() != text]
    if "--check" in sys.argv:
        told = "is not what the recipes say: run python -m tools.make_recipes"
        print(*(f"{page.relative_to(ROOT)} {told}" for page in changed), sep="\n")
        return len(changed)
    for page in changed:
        page.write_text(written[page])
    return 0


def run_all(records: dict[str, Any]) -> None:
    """Train every recipe whose record is missing or is that of another file, and store each as it comes."""
    for recipe in sorted(all_recipes(), key=lambda recipe: (recipe.name not in KNOWN, recipe.name)):
        if records.get(recipe.name, {}).get("sha256") != sha256(recipe):
            records[recipe.name] = {"sha256": sha256(recipe), "runs": trained(recipe)}
            RECORDS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")


def trained(recipe: Recipe) -> list[dict[str, Any]]:
    """Train a recipe with every seed in a folder that is thrown away, and keep what is shown of each run."""
    from lit_opd.config import load_config
    from lit_opd.runs import train

    kept = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            own = (f"seed={seed}", f"output_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlflow.db")
            outcome = train(load_config([recipe.file], [*FAST, *own]))
        values = {when: {name: getattr(outcome, when)[name].mean for name in SHOWN} for when in ("before", "after")}
        kept.append({"seed": seed, "steps": outcome.steps, **values})
        print(recipe.name, kept[-1], flush=True)
    return kept


def sha256(recipe: Recipe) -> str:
    """Give the checksum of what a recipe's file sets, whatever its comments say."""
    told = [line.partition(" #")[0].rstrip() for line in recipe.file.read_text().splitlines() if line[:1] != "#"]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def page_table(records: dict[str, Any]) -> str:
    """Write the table of all recipes."""
    shown = SHOWN if records else ()
    names = (name.replace("_", " ").replace("kl", "KL") for name in shown)
    header = ("system", "objective", "teacher", "source", "`python -m lit_opd`", "not reproduced", *names)
    rows = []
    for recipe in all_recipes():
        head, command = recipe.head, f"`fit --config conf/recipes/{recipe.file.name}`"
        told = (head["objective"], head["teacher"], head["source"], command, head["not reproduced"])
        rows.append((f"[{head['system']}]({recipe.file.name})", *told, *results(records, recipe)[: len(shown)]))
    return table(header, rows)


def results(records: dict[str, Any], recipe: Recipe) -> list[str]:
    """Write what came of a recipe's runs: before -> after with the interval over seeds."""
    record = records.get(recipe.name, {})
    if record.get("sha256") != sha256(recipe):
        return ["not run"] * len(SHOWN)
    cells = []
    for name in SHOWN:
        before = sum(run["before"][name] for run in record["runs"]) / len(record["runs"])
        after = over_prompts([run["after"][name] for run in record["runs"]], [1.0] * len(record["runs"]))
        cells.append(f"{before:.2f} → {after.mean:.2f} [{after.low:.2f}, {after.high:.2f}]")
    return cells


def known() -> str:
    """Write README's table: system, objective, and what runs it."""
    heads = {recipe.name: recipe.head for recipe in all_recipes()}
    rows = (
        (said, short(heads[name]["objective"]), f"`python -m lit_opd fit --config conf/recipes/{name}.yaml`")
        for name, said in KNOWN.items()
    )
    return table(("system", "objective", "command"), rows)


def short(objective: str) -> str:
    """Cut an objective at its first comma or bracket."""
    return objective.partition(",")[0].partition(" (")[0]


def table(header: tuple[str, ...], rows: Any) -> str:
    """Write a table in Markdown."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, content: str) -> str:
    """Put content between the markers of a page."""
    before, opening, rest = text.partition(MARKERS[0])
    _, closing, after = rest.partition(MARKERS[1])
    if not closing:
        raise SystemExit(f"no place for the recipes: {MARKERS[0].strip()} ... {MARKERS[1]}")
    return before + opening + content + "\n" + closing + after


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
