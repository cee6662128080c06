"""Show what the audit says of the mismatched pair, and what its two proposals are worth: short runs with and without.

Usage: ``python -m tools.mend_mismatched_pair --pair FOLDER [--steps N] [--seeds N] [--estimators NAME ...]
[--arms NAME ...] [--out FILE.md]``

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

from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config, load_config
from lit_opd.errors import RunError
from lit_opd.lab.audit import audit, print_audit
from lit_opd.runs.distillation import train

QUICKSTART = Path(__file__).parents[1] / "conf" / "quickstart.yaml"
METRICS = ("accuracy", "truncated_frac", "length")


def proposed_mask(pair: Path) -> list[int]:
    """The ids that the audit proposes to leave out of the count."""
    found = audit(configure(pair, "student", "full_vocab", seed=0))
    return [row.id for row in found.tokens if row.huge and not row.stops]


def arms(pair: Path) -> dict[str, tuple[str, list[int]]]:
    """The student's folder and the masked ids of every arm."""
    mask = proposed_mask(pair)
    return {
        "as it is": ("student", []),
        "mask": ("student", mask),
        "either end stops": ("student_both_ends", []),
        "both": ("student_both_ends", mask),
    }


def configure(pair: Path, student: str, estimator: str, seed: int, *extra: str) -> Config:
    """The quickstart on this pair, with two tokens more for the tag."""
    return load_config([QUICKSTART], [
        f"student.path={pair / student}", f"teacher.path={pair / 'teacher'}", f"estimator.name={estimator}",
        f"seed={seed}", "rollout.max_new_tokens=24", *extra,
    ])  # fmt: skip


def run(pair: Path, student: str, mask: list[int], estimator: str, seed: int, steps: int) -> dict[str, float]:
    """The held-out results after a short run."""
    with tempfile.TemporaryDirectory() as folder:
        config = configure(
            pair, student, estimator, seed, f"output_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"trainer.max_steps={steps}", f"evaluation.every_n_steps={steps}", "optim.warmup_steps=5",
            "evaluation.teacher=false", "trainer.enable_progress_bar=false", "tracking.system_metrics=false",
            f"estimator.masked_tokens={mask}",
        )  # fmt: skip
        outcome = train(config)
    values = {name: outcome.after[name].mean for name in METRICS}
    return values | {"before": outcome.before["accuracy"].mean}


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Accuracy before and after, means over seeds, and what each seed came to."""
    lines = ["| estimator | arm | before | after | each seed | truncated | length |", "|---|---|---|---|---|---|---|"]
    for estimator, by_arm in results.items():
        for arm, runs in by_arm.items():
            means = {name: statistics.mean(run[name] for run in runs) for name in (*METRICS, "before")}
            each = ", ".join(f"{run['accuracy']:.3f}" for run in runs)
            numbers = f"{means['truncated_frac']:.3f} | {means['length']:.1f}"
            lines.append(
                f"| {estimator} | {arm} | {means['before']:.3f} | {means['accuracy']:.3f} | {each} | {numbers} |"
            )
    return "\n".join(lines)


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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    text = audit_text(arguments.pair, "student")
    print(text, flush=True)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for estimator in arguments.estimators:
        chosen = {arm: how for arm, how in arms(arguments.pair).items() if arm in (arguments.arms or [arm])}
        for arm, (student, mask) in chosen.items():
            for seed in range(arguments.seeds):
                values = run(arguments.pair, student, mask, estimator, seed, arguments.steps)
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
