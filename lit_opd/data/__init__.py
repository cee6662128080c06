"""Load prompts, encode and order them, and judge the answers to them.

`runs.prepare` makes the `PromptDataModule` of a configured run. In Python it is made from rows as well.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "PromptDataModule": "lit_opd.data.datamodule",
    "PromptStream": "lit_opd.data.stream",
    "Verifier": "lit_opd.data.guarded",
    "build_verifier": "lit_opd.data.verifiers",
    "encode_rows": "lit_opd.data.prompts",
    "load_rows": "lit_opd.data.rows",
    "pad_left": "lit_opd.data.prompts",
    "render": "lit_opd.data.prompts",
}
__all__ = [
    "PromptDataModule", "PromptStream", "Verifier", "build_verifier", "encode_rows", "load_rows", "pad_left", "render",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported on first use: a source such as lit_opd.data.arithmetic needs no torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lit_opd.data' has no attribute {name!r}")
