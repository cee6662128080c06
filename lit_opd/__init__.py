"""lit_opd: on-policy distillation of language models, with objectives whose gradients are known."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DistillationModule": "lit_opd.module",
    "PromptDataModule": "lit_opd.data",
    "load_config": "lit_opd.config",
    "register_estimator": "lit_opd.estimators",
}
__all__ = ["DistillationModule", "PromptDataModule", "load_config", "register_estimator"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `--help` and configuration errors must not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lit_opd' has no attribute {name!r}")
