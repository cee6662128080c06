"""Say what a comparison is made of: variants of one run, each with several seeds, checked before the first starts.

The command line calls this. It imports no torch, so that a mistake in a file is reported in under a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_opd.config import Config, TrackingConfig, config_file, load_as, load_config, to_flat
from lit_opd.errors import UserError
from lit_opd.lab.compare.contrasts import TO_THE_BEST, check_contrasts

__all__ = ["Comparison", "Run", "Tracking", "load_comparison", "runs_of", "within"]

# Without these being the same, two runs cannot be paired prompt by prompt, or one had more to learn from.
FIXED = ("data", "evaluation", "trainer.max_steps", "trainer.max_epochs", "trainer.max_time",
         "trainer.limit_train_batches", "trainer.limit_val_batches")  # fmt: skip
OWN = {
    "seed": "Set seeds.",
    "output_dir": "Set output_dir of the comparison.",
    "tracking.uri": "Set tracking.uri of the comparison.",
    "tracking.experiment": "Set tracking.experiment of the comparison.",
    "tracking.run_name": "A run is named after its variant and its seed.",
}


@dataclass
class Tracking:
    """The store that records the comparison and its runs."""

    uri: str = str(TrackingConfig.uri)
    experiment: str = "compare"
    run_name: str | None = None


@dataclass
class Comparison:
    """Variants x seeds of one configuration."""

    base: list[str] = field(default_factory=list)
    """Files of the configuration that all runs share, as `--config` takes them."""
    overrides: list[str] = field(default_factory=list)
    """Dotted overrides of it, for all runs."""
    variants: Any = None
    """Label -> the dotted overrides that make it; or a list of names of estimators.

    A `${key}` in an override is one of the comparison; after a backslash, one of the run.
    """
    seeds: list[int] = field(default_factory=list)
    """Of the runs; every variant runs with each."""
    contrasts: str = TO_THE_BEST
    """What is tested: best (each variant with the best) | all (every two) | a variant's label, as the baseline."""
    parallel: int = 1
    """How many runs at once, which share the processor's cores."""
    output_dir: str = "outputs/compare"
    """Where runs and report are written."""
    tracking: Tracking = field(default_factory=Tracking)
    """Where they are recorded."""
    may_differ: list[str] = field(default_factory=list)
    """Keys or sections that variants may change though they are to be the same in all runs."""


@dataclass(frozen=True)
class Run:
    """One run: a variant with a seed, what it is called in tables and in MLflow, and its whole configuration."""

    variant: str
    seed: int
    name: str
    config: Config

    @property
    def folder(self) -> Path:
        """The `output_dir` of the run."""
        return Path(self.config.output_dir)

    @property
    def file(self) -> Path:
        """The configuration file from which it is started."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """The file of all that it printed."""
        return self.folder.with_name(f"{self.folder.name}.log")


def load_comparison(files: Sequence[str | Path], overrides: Iterable[str] = ()) -> Comparison:
    """Build a comparison, checked and with `variants` as a mapping, from YAML files and dotted overrides."""
    comparison = load_as(Comparison, files, overrides)
    for key, example in {
        "base": "[conf/quickstart.yaml]",
        "seeds": "[0, 1, 2]",
        "variants": "[token, full_vocab]",
    }.items():
        if not getattr(comparison, key):
            raise UserError(key, "at least one", "none", f"Write e.g. {key}: {example}")
    variants = _mapping(comparison.variants)
    _check_once("seeds", comparison.seeds)
    if comparison.parallel < 1:
        raise UserError("parallel", "at least 1", comparison.parallel, "Write 1 for one run after the other.")
    _check_own("overrides", comparison.overrides)
    for label, words in variants.items():
        _check_own(f"variants.{label}", words)
    _check_labels(variants)
    for key in comparison.may_differ:
        if not within(key, FIXED):
            expected = f"keys that are to be the same in all runs ({', '.join(FIXED)})"
            raise UserError("may_differ", expected, repr(key), "Leave it out: variants may change every other key.")
    check_contrasts(comparison.contrasts, variants)
    return replace(comparison, variants=variants)


def runs_of(comparison: Comparison) -> list[Run]:
    """Build all runs, every variant with the first seed before any with the second, that may be compared."""
    for file in comparison.base:
        config_file(file, "base")
    base = load_config(comparison.base, [*comparison.overrides, f"seed={comparison.seeds[0]}"])
    runs = [_run(comparison, label, seed) for seed in comparison.seeds for label in comparison.variants]
    for run in runs:
        _check_fixed(base, run, comparison.may_differ)
    _check_different(runs[: len(comparison.variants)])
    return runs


def within(key: str, sections: Iterable[str]) -> bool:
    """Tell whether a dotted key is one of the others, or lies inside of one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _run(comparison: Comparison, label: str, seed: int) -> Run:
    try:
        config = load_config(comparison.base, [*comparison.overrides, *comparison.variants[label], f"seed={seed}"])
    except UserError as error:
        raise UserError(f"variants.{label}: {error.key}", error.expected, error.found, error.remedy) from error
    name, where = f"{label} · seed {seed}", comparison.tracking
    tags = config.tracking.tags | {"variant": label}
    tracking = replace(config.tracking, uri=where.uri, experiment=where.experiment, run_name=name, tags=tags)
    folder = Path(comparison.output_dir) / "runs" / _slug(label) / f"seed-{seed}"
    return Run(label, seed, name, replace(config, output_dir=str(folder), tracking=tracking))


def _slug(label: str) -> str:
    return re.sub(r"[^\w=.-]+", "-", label).strip("-.")


def _mapping(variants: Any) -> dict[str, list[str]]:
    remedy = "Write e.g. [token, full_vocab], or `label: [estimator.name=token]` for each of them."
    if isinstance(variants, list):
        for name in variants:
            if not isinstance(name, str):
                raise UserError("variants", "names of estimators in a list", repr(name), remedy)
        _check_once("variants", variants)
        variants = {name: [f"estimator.name={name}"] for name in variants}
    if not isinstance(variants, dict):
        raise UserError("variants", "a mapping label -> overrides, or a list of estimators", repr(variants), remedy)
    for label, words in variants.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            expected = "a list of overrides of the form key=value"
            raise UserError(f"variants.{label}", expected, repr(words), "Write e.g. [estimator.name=token].")
    return {str(label): words for label, words in variants.items()}


def _check_once(key: str, values: Sequence[Any]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(key, "each of them once", f"{value!r} twice", "Remove one.")


def _check_own(where: str, words: Iterable[str]) -> None:
    for word in words:
        key = word.partition("=")[0]
        for own, remedy in OWN.items():
            if within(own, [key]) or within(key, [own]):
                raise UserError(f"{where}: {key}", "to be left out: the comparison sets it", repr(word), remedy)


def _check_labels(variants: Iterable[str]) -> None:
    taken: dict[str, str] = {}
    for label in variants:
        slug, expected, found = _slug(label), "", repr(label)
        if not label.isprintable() or "`" in label:
            expected = "labels on one line, without backticks"
        elif not slug:
            expected = "labels with a letter or a digit"
        elif slug in taken:
            expected = "labels that differ in letters or digits"
            found = f"{taken[slug]!r} and {label!r}, which would both be written to {slug!r}"
        if expected:
            raise UserError("variants", expected, found, "Rename it.")
        taken[slug] = label


def _check_fixed(base: Config, run: Run, may_differ: Sequence[str]) -> None:
    wanted, held = _fixed(base), _fixed(run.config)
    for key in sorted(wanted.keys() | held.keys()):
        if wanted.get(key) != held.get(key) and not within(key, may_differ):
            expected = f"{wanted.get(key)!r} as in the base, for runs to be comparable"
            found = f"{held.get(key)!r} (seed {run.seed})"
            remedy = f"Set it in overrides, or list {key} under may_differ."
            raise UserError(f"variants.{run.variant}: {key}", expected, found, remedy)


def _fixed(config: Config) -> dict[str, Any]:
    values = {key: value for key, value in to_flat(config).items() if within(key, FIXED)}
    # Null means the length of training's completions: a variant that changes those would be measured on others.
    return values | {"evaluation.max_new_tokens": config.evaluation.max_new_tokens or config.rollout.max_new_tokens}


def _check_different(runs: Sequence[Run]) -> None:
    seen: list[tuple[dict[str, Any], str]] = []
    for run in runs:
        setting = {k: v for k, v in to_flat(run.config).items() if not within(k, ("output_dir", "tracking"))}
        for other, variant in seen:
            if setting == other:
                found = f"{variant!r} and {run.variant!r}, which are the same"
                raise UserError("variants", "variants that differ", found, "Remove one.")
        seen.append((setting, run.variant))
