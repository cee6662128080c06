"""Describe a run in dataclasses, filled from YAML files and dotted overrides by OmegaConf.

Each section says beside a field what it means and which values it may have. Imports no torch, so that a mistake in a
file is reported in under a second.
"""

from lit_opd.config.inputs import (
    DataConfig,
    FrozenConfig,
    StudentConfig,
    TeacherConfig,
    check_names,
    check_schedule,
)
from lit_opd.config.learning import EstimatorConfig, OptimConfig, RolloutConfig
from lit_opd.config.limits import Section
from lit_opd.config.paths import PACKAGE_FOLDER, config_file
from lit_opd.config.reading import as_section, load_as, load_config, parse_overrides, to_flat, to_yaml
from lit_opd.config.schema import Config
from lit_opd.config.watching import (
    CheckpointConfig,
    CollapseConfig,
    DiagnosticsConfig,
    EvaluationConfig,
    LintConfig,
    MeasureConfig,
    TrackingConfig,
)

__all__ = [
    "PACKAGE_FOLDER", "CheckpointConfig", "CollapseConfig", "Config", "DataConfig", "DiagnosticsConfig",
    "EstimatorConfig", "EvaluationConfig", "FrozenConfig", "LintConfig", "MeasureConfig", "OptimConfig",
    "RolloutConfig", "Section", "StudentConfig", "TeacherConfig", "TrackingConfig", "as_section", "check_names",
    "check_schedule", "config_file", "load_as", "load_config", "parse_overrides", "to_flat", "to_yaml",
]  # fmt: skip
