"""Describe what a run reports: the sections of evaluations, measurements, warnings and records.

`load_config` fills and checks them. Evaluations, callbacks, tracking and the experiments of `lab/` read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_opd.config import limits
from lit_opd.config.limits import Section, at_least, limited, one_of, within
from lit_opd.errors import UserError

__all__ = [
    "CheckpointConfig", "CollapseConfig", "DiagnosticsConfig", "EvaluationConfig", "LintConfig", "MeasureConfig",
    "TrackingConfig",
]  # fmt: skip


@dataclass
class EvaluationConfig(Section):
    """The yardsticks: always at temperature 1, untruncated, on fixed prompts and seeds."""

    every_n_steps: int = limited(50, at_least(1))
    """Steps between evaluations and between checkpoints."""
    num_completions: int = limited(1, at_least(1))
    """Completions a prompt."""
    max_new_tokens: int | None = limited(None, at_least(1, null="rollout.max_new_tokens"))
    """The longest completion, in tokens, or null for rollout.max_new_tokens."""
    batch_size: int = limited(64, at_least(1))
    """Prompts a batch, in each process."""
    pass_at: list[int] = field(default_factory=lambda: [1])
    """The k of pass@k: the chance that one of k completions is right."""
    seed: int = limited(0, limits.seed)
    """Of the completions."""
    num_examples: int = limited(16, at_least(0))
    """Completions kept to read, with the log-ratio of every token."""
    teacher: bool = True
    """Measure the teacher's own completions too, before training."""
    measures: list[str] = field(default_factory=list)
    """Yardsticks of your own: package.module:function or path/to/file.py:function, made by `register_measure`."""

    def check(self, name: str = "") -> None:
        """Check every value, and each k of pass@k."""
        super().check(name)
        for k in self.pass_at:
            if not 1 <= k <= self.num_completions:
                expected = f"values from 1 to {name}.num_completions ({self.num_completions})"
                raise UserError(f"{name}.pass_at", expected, k, f"Raise {name}.num_completions or drop it.")


@dataclass
class MeasureConfig(Section):
    """The gradients of several estimators on the same rollouts: `python -m lit_opd measure`."""

    estimators: list[Any] = field(default_factory=list)
    """Names, or {name: ..., kwargs: {...}, label: ...}, or none for a choice of all families."""
    units: int = limited(64, at_least(4))
    """Independent measurements, from which intervals come."""
    prompts_per_unit: int = limited(16, at_least(1))
    """Prompts of a unit, each with rollout.num_completions completions."""
    parameters: str = ".*"
    """A regular expression: whose gradients are looked at."""
    sketch: int = limited(65536, at_least(1))
    """Dimensions that are kept of a longer gradient."""


@dataclass
class DiagnosticsConfig(Section):
    """The numbers and pictures of a run besides its evaluations."""

    every_n_steps: int = limited(10, at_least(0, " (0 leaves them out)"))
    """Steps between two looks at advantages, masses, sampler and gradient, or 0 for none."""
    support_size: int = limited(16, at_least(1))
    """Tokens of each model whose overlap and mass evaluations measure."""
    print_every_n_steps: int = limited(10, at_least(0, " (0 prints none)"))
    """Steps between two lines of progress in a log file, where no terminal shows a bar, or 0 for none."""
    figures: bool = True
    """Curves by position, histograms and coloured completions at evaluations."""


@dataclass
class CheckpointConfig(Section):
    """The checkpoints that a run keeps besides its newest, which is written at every evaluation."""

    keep_best: str | None = None
    """A yardstick, as reverse_kl: keep the best evaluation's, and export it of a run that collapse stops; or null."""


@dataclass
class CollapseConfig(Section):
    """The signs that training goes wrong, in the mean of the last steps, and what happens then."""

    action: str = limited("warn", one_of("off", "warn", "stop"))
    """off | warn | stop (with a checkpoint)."""
    window: int = limited(10, at_least(1))
    """Steps of the mean."""
    min_entropy: float = limited(0.001, at_least(0, " (0 never warns)"))
    """Of the student, in nats per token."""
    max_repetition: float = limited(0.5, within("in (0, 1] (1 never warns)", lambda v: 0 < v <= 1))
    """The share of 4-grams that occurred before in their completion."""
    max_truncated: float = limited(0.9, within("in (0, 1] (1 never warns)", lambda v: 0 < v <= 1))
    """The share of completions cut at rollout.max_new_tokens."""
    min_support_mass: float = limited(0.2, within("in [0, 1) (0 never warns)", lambda v: 0 <= v < 1))
    """Of the student on the tokens that the estimator compares."""


@dataclass
class TrackingConfig(Section):
    """The store that records runs."""

    uri: str = "sqlite:///mlflow.db"
    """Any MLflow tracking URI."""
    experiment: str = "lit_opd"
    """Runs of one experiment are compared in one table."""
    run_name: str | None = None
    """The name of the run, which MLflow chooses where it is null."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags of the run."""
    system_metrics: bool = True
    """CPU, memory, disk and network in the run's System metrics tab."""


@dataclass
class LintConfig(Section):
    """Refused configurations that may pass."""

    allow: list[str] = field(default_factory=list)
    """The names of the rules that refuse them."""
