"""Show what the audit says of the mismatched pair, and what its proposals are worth: short runs with and without.

Usage: ``python -m tools.mend_mismatched_pair --pair FOLDER [--steps N] [--seeds N] [--estimators NAME ...]
[--arms NAME ...] [--out FILE.md] [--no-audit]``

FOLDER is what ``tools.make_mismatched_pair`` wrote. Every run is conf/quickstart.yaml on that pair, shortened; arms
differ in nothing but what the audit proposes. Prompts and sampled randomness of a seed are common to all arms.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

import torch
from scipy import stats

from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config, load_config
from lit_opd.errors import RunError
from lit_opd.lab.audit import audit, print_audit
from lit_opd.runs.distillation import train
from tools.make_mismatched_pair import END

QUICKSTART = Path(__file__).parents[1] / "conf" / "quickstart.yaml"
METRICS = ("accuracy", "truncated_frac", "length")


def proposed_mask(pair: Path) -> list[int]:
    """The ids that the audit proposes to leave out of the count."""
    found = audit(configure(pair, "student", "full_vocab", seed=0))
    return [row.id for row in found.tokens if row.huge and not row.stops]


def arms(pair: Path, wanted: list[str] | None) -> dict[str, tuple[str, list[str]]]:
    """The student's folder and the overrides of every arm, or of those wanted."""
    mask = f"estimator.masked_tokens={proposed_mask(pair)}" if wanted is None or {"mask", "both"} & {*wanted} else ""
    ends = ",".join(END.values())
    every = {
        "as it is": ("student", []),
        "mask": ("student", [mask]),
        "either end stops": ("student_both_ends", []),
        "both": ("student_both_ends", [mask]),
        "ends masked": ("student", [f"estimator.masked_tokens=[{ends}]", "lint.allow=[no_stop_signal]"]),
        "ends merged": ("student", ["estimator.merged_stops=auto"]),
    }
    return {arm: how for arm, how in every.items() if arm in (wanted or every)}


def configure(pair: Path, student: str, estimator: str, seed: int, *extra: str) -> Config:
    """The quickstart on this pair, with two tokens more for the tag."""
    return load_config([QUICKSTART], [
        f"student.path={pair / student}", f"teacher.path={pair / 'teacher'}", f"estimator.name={estimator}",
        f"seed={seed}", "rollout.max_new_tokens=24", *extra,
    ])  # fmt: skip


def run(pair: Path, student: str, arm: list[str], estimator: str, seed: int, steps: int) -> dict[str, float]:
    """The held-out results after a short run."""
    with tempfile.TemporaryDirectory() as folder:
        config = configure(
            pair, student, estimator, seed, f"output_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"trainer.max_steps={steps}", f"evaluation.every_n_steps={steps}", "optim.warmup_steps=5",
            "evaluation.teacher=false", "trainer.enable_progress_bar=false", "tracking.system_metrics=false",
            *arm,
        )  # fmt: skip
        outcome = train(config)
    values = {name: outcome.after[name].mean for name in METRICS}
    return values | {"before": outcome.before["accuracy"].mean}


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Accuracy before and after, means over seeds with half a 95% interval (Student's t), and what each seed gave."""
    lines = ["| estimator | arm | before | after | each seed | truncated | length |", "|---|---|---|---|---|---|---|"]
    for estimator, by_arm in results.items():
        for arm, runs in by_arm.items():
            means = {name: mean_over_seeds([run[name] for run in runs]) for name in METRICS}
            before = statistics.mean(run["before"] for run in runs)
            each = ", ".join(f"{run['accuracy']:.3f}" for run in runs)
            numbers = f"{before:.3f} | {means['accuracy']} | {each} | {means['truncated_frac']} | {means['length']}"
            lines.append(f"| {estimator} | {arm} | {numbers} |")
    return "\n".join(lines)


def mean_over_seeds(values: list[float]) -> str:
    """A mean, and how far on either side of it the true one lies, at 95%."""
    size = len(values)
    if size < 2:
        return f"{values[0]:.3f}"
    half = stats.t.ppf(0.975, size - 1) * statistics.stdev(values) / size**0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def audit_text(pair: Path, student: str) -> str:
    """What `python -m lit_opd audit` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = audit(configure(pair, student, "full_vocab", seed=0))
        print_audit(found)
        try:
            found.enforce()
        except RunError as error:
            print(f"\nfailed: {error}")
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--estimators", nargs="+", default=["full_vocab", "token"])
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-audit", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    text = "" if arguments.no_audit else audit_text(arguments.pair, "student")
    print(text, flush=True)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for estimator in arguments.estimators:
        for arm, (student, overrides) in arms(arguments.pair, arguments.arms).items():
            for seed in range(arguments.seeds):
                values = run(arguments.pair, student, overrides, estimator, seed, arguments.steps)
                results.setdefault(estimator, {}).setdefault(arm, []).append(values)
                print(json.dumps({"estimator": estimator, "arm": arm, "seed": seed, **values}), flush=True)
    print(table(results))
    if arguments.out is not None:
        arguments.out.write_text(page(text, audit_text(arguments.pair, "student_both_ends"), results, arguments.steps))


def page(before: str, mended: str, results: dict[str, dict[str, list[dict[str, float]]]], steps: int) -> str:
    """The page that is committed."""
    seeds = len(next(iter(next(iter(results.values())).values())))
    return (
        "# A pair that does not share its habits\n\n"
        "Made by `python -m tools.make_mismatched_pair --out PAIR` and `python -m tools.mend_mismatched_pair "
        "--pair PAIR --out docs/mismatched_pair.md`.\n\n"
        f"## What the audit says\n\n```text\n{before}\n```\n\n"
        f"With either end stopping the student (`student_both_ends`):\n\n```text\n{mended}\n```\n\n"
        f"## What its proposals are worth\n\n{steps} steps of conf/quickstart.yaml (warm-up of 5) on this pair, "
        f"{seeds} seeds, 512 held-out prompts, completions of at most 24 tokens. Accuracy "
        "before and after; truncated: the share of completions that did not end.\n\n"
        f"{table(results)}\n"
    )


if __name__ == "__main__":
    main()
