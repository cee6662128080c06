"""Put the sections together to the whole configuration of a run.

`load_config` makes a `Config`, and every command is given one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_opd.config import limits
from lit_opd.config.inputs import DataConfig, FrozenConfig, StudentConfig, TeacherConfig, check_names, check_schedule
from lit_opd.config.learning import EstimatorConfig, OptimConfig, RolloutConfig
from lit_opd.config.limits import Section, limited, one_of
from lit_opd.config.watching import (
    CheckpointConfig,
    CollapseConfig,
    DiagnosticsConfig,
    EvaluationConfig,
    LintConfig,
    MeasureConfig,
    TrackingConfig,
)
from lit_opd.errors import UserError

__all__ = ["Config"]


@dataclass
class Config(Section):
    """One run."""

    seed: int = limited(0, limits.seed)
    """Of the order of prompts and of everything sampled in training."""
    output_dir: str = "outputs/run"
    """Checkpoints, exported student and summary, in a folder that holds no other run."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model that learns."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen model to learn from."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Several teachers instead, by name, each with the keys of the section teacher. data.teacher_column chooses."""
    teachers_combined: str = limited("mixture", one_of("mixture", "product"))
    """Several teachers of one row: mixture (of their probabilities) | product (a weighted sum of reverse KLs)."""
    teachers_schedule: dict[str, Any] = field(default_factory=dict)
    """By the name of a teacher, factors of its weights before training and at its end, as {a: [1, 0], b: [0, 1]}."""
    reference: FrozenConfig = field(default_factory=FrozenConfig)
    """A third model, for estimators that stay near one, by default the student before training."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts, where they come from, and how an answer is judged."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The completions to train on, and how they are made."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    """The objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer's step."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any argument of lightning.Trainer."""
    callbacks: list[Any] = field(default_factory=list)
    """Further callbacks of `fit`: package.module:name, file.py:name, or {path: ..., kwargs: {...}}."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The yardsticks on held-out prompts."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints that a run keeps besides its newest."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """The gradients of several estimators on the same rollouts."""
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    """The numbers and pictures of a run besides its evaluations."""
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    """The signs that training goes wrong, and what happens then."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """The store that records the run."""
    lint: LintConfig = field(default_factory=LintConfig)
    """Refused configurations that may pass."""

    def check(self, name: str = "") -> None:
        """Check every section, and what two of them have to agree on."""
        super().check(name)
        sequences = self.data.batch_size * self.rollout.num_completions
        if self.optim.updates_per_rollout > sequences:
            expected = f"at most data.batch_size x rollout.num_completions ({sequences})"
            found = self.optim.updates_per_rollout
            raise UserError("optim.updates_per_rollout", expected, found, "Lower it or sample more.")

    def _check_field(self, own: Any, name: str) -> None:
        if own.name == "teachers":
            check_names(self.teachers)
        if own.name == "teachers_schedule":
            check_schedule(self.teachers_schedule, [*self.teachers])
        if own.name == "teacher" and self.teachers:
            if self.teacher != TeacherConfig():
                raise UserError("teachers", "one teacher, or several", "both", "Take out one of the sections.")
            return
        super()._check_field(own, name)
