"""The configuration: dataclasses, filled from YAML files and dotted overrides by OmegaConf.

Imports no torch, so that a mistake in a file is reported in under a second.
"""

from lit_opd.bounds import check_values
from lit_opd.config.loading import PACKAGE_FOLDER, as_section, load_as, load_config, to_flat, to_yaml
from lit_opd.config.schema import (
    CollapseConfig,
    Config,
    DataConfig,
    DiagnosticsConfig,
    EstimatorConfig,
    EvaluationConfig,
    FrozenConfig,
    LintConfig,
    MeasureConfig,
    OptimConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    TrackingConfig,
)

__all__ = [
    "PACKAGE_FOLDER", "CollapseConfig", "Config", "DataConfig", "DiagnosticsConfig", "EstimatorConfig",
    "EvaluationConfig", "FrozenConfig", "LintConfig", "MeasureConfig", "OptimConfig", "RolloutConfig", "StudentConfig",
    "TeacherConfig", "TrackingConfig", "as_section", "check_values", "load_as", "load_config", "to_flat", "to_yaml",
]  # fmt: skip
