"""The dataclasses of the configuration, with every default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

__all__ = [
    "CollapseConfig", "Config", "DataConfig", "DiagnosticsConfig", "EstimatorConfig", "EvaluationConfig",
    "FrozenConfig", "LintConfig", "MeasureConfig", "OptimConfig", "RolloutConfig", "StudentConfig", "TeacherConfig",
    "TrackingConfig",
]  # fmt: skip


@dataclass
class StudentConfig:
    """The model that learns."""

    path: str = MISSING
    dtype: str = "float32"
    gguf_file: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    lora: dict[str, Any] | None = None


@dataclass
class FrozenConfig:
    """A frozen model; as a reference, no path names the student as it lies, untrained.

    With `offload`, it is on the accelerator only while it scores or samples; its output layer stays.
    """

    path: str | None = None
    dtype: str = "bfloat16"
    gguf_file: str | None = None
    trust_remote_code: bool = False
    quantization: str = "none"
    offload: bool = False


@dataclass
class TeacherConfig(FrozenConfig):
    """The frozen model to learn from; a temperature other than 1 gives the student another distribution to reach."""

    path: str = MISSING
    temperature: float = 1.0


@dataclass
class DataConfig:
    """Prompts, where they come from, and how an answer is judged."""

    source: str = "file"
    path: str | None = None
    validation_path: str | None = None
    split: str = "train"
    kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_column: str = "prompt"
    answer_column: str | None = "answer"
    chat: bool = False
    system_prompt: str | None = None
    examples: list[dict[str, str]] = field(default_factory=list)
    prompt_template: str = "{prompt}"
    train_size: int | None = None
    validation_size: int = 256
    validation_seed: int = 0
    max_prompt_tokens: int = 512
    overlong: str = "drop"
    batch_size: int = 8
    verifier: str | None = None


@dataclass
class RolloutConfig:
    """How the student samples."""

    engine: str = "local"
    server: str | None = None
    num_completions: int = 1
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    student_share: float = 1.0
    demonstrations: str = "teacher"


@dataclass
class EstimatorConfig:
    """The objective."""

    name: str = "full_vocab"
    kwargs: dict[str, Any] = field(default_factory=dict)
    terms: list[Any] = field(default_factory=list)
    masked_tokens: list[Any] = field(default_factory=list)
    aggregation: str = "token_mean"
    adapt_gamma_every: int | None = None

    def __post_init__(self) -> None:
        """Name what a list of terms is, where no other name is given."""
        if self.terms and self.name == "full_vocab":
            self.name = "mix"


@dataclass
class OptimConfig:
    """The optimizer step."""

    name: str = "AdamW"
    lr: float = 1e-5
    kwargs: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    updates_per_rollout: int = 1
    micro_batch_tokens: int = 16384
    head_chunk_mib: int = 256


@dataclass
class EvaluationConfig:
    """The yardsticks: always at temperature 1, untruncated, on fixed prompts and seeds."""

    every_n_steps: int = 50
    num_completions: int = 1
    max_new_tokens: int | None = None
    batch_size: int = 64
    pass_at: list[int] = field(default_factory=lambda: [1])
    seed: int = 0
    num_examples: int = 16
    teacher: bool = True


@dataclass
class MeasureConfig:
    """The estimator microscope: which estimators, on how much, looking at which parameters.

    Estimators are names, or mappings with `name`, `kwargs` and `label`. Without any, a choice from all families.
    """

    estimators: list[Any] = field(default_factory=list)
    units: int = 64
    prompts_per_unit: int = 16
    parameters: str = ".*"
    sketch: int = 65536


@dataclass
class DiagnosticsConfig:
    """What a run tells of itself besides the yardsticks; 0 steps leave out the numbers, `figures` the pictures."""

    every_n_steps: int = 10
    support_size: int = 16
    figures: bool = True


@dataclass
class CollapseConfig:
    """When training is going wrong, judged by the mean of the last `window` steps, and what happens then."""

    action: str = "warn"
    window: int = 10
    min_entropy: float = 0.001
    max_repetition: float = 0.5
    max_truncated: float = 0.9
    min_support_mass: float = 0.2


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = "sqlite:///mlflow.db"
    experiment: str = "lit_opd"
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    system_metrics: bool = True


@dataclass
class LintConfig:
    """Refused configurations that may pass, by the name of the rule that refuses them."""

    allow: list[str] = field(default_factory=list)


@dataclass
class Config:
    """One run."""

    seed: int = 0
    output_dir: str = "outputs/run"
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reference: FrozenConfig = field(default_factory=FrozenConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    lint: LintConfig = field(default_factory=LintConfig)
