"""Take what a script in Python gives for a model and its tokenizer: a path, a section's keys, or the thing itself.

`DistillationModule` calls it first, so that what is none of these is told by its name. Its checkpoints hold what it was
given, so that one can be made of them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lit_opd.config import FrozenConfig, Section, StudentConfig, as_section
from lit_opd.errors import UserError

__all__ = ["as_model", "check_tokenizer", "from_saved", "to_saved"]

IN_PYTHON = "given in Python"


def as_model(schema: type[StudentConfig] | type[FrozenConfig], value: Any, key: str) -> Any:
    """Make a section of a path or of a mapping of its keys, and give back a section or a model as it is.

    Raises:
        UserError: it is none of them, or a section that checks refuse.
    """
    if isinstance(value, str | os.PathLike):
        value = schema(path=os.fspath(value))
    if isinstance(value, Mapping | schema):
        return as_section(schema, value, key)
    if isinstance(value, nn.Module) and hasattr(value, "get_output_embeddings"):
        return value
    expected = f"a path, a {schema.__name__} or its keys, or a causal language model of transformers"
    raise UserError(key, expected, f"{value!r:.80}, a {type(value).__name__}", "Pass one of them.")


def check_tokenizer(key: str, value: Any) -> None:
    """Check that a tokenizer, where one was given, is one.

    Raises:
        UserError: it is a path or something else.
    """
    if value is not None and not hasattr(value, "get_vocab"):
        remedy = "Pass what AutoTokenizer.from_pretrained returns."
        raise UserError(key, "a tokenizer of transformers", f"{value!r:.80}, a {type(value).__name__}", remedy)


def to_saved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Write arguments as plain values that a checkpoint may hold, and mark what lives in Python only."""
    saved: dict[str, Any] = {}
    for key, value in given.items():
        plain: Any = asdict(value) if isinstance(value, Section) else value  # type: ignore[call-overload]
        try:
            saved[key] = json.loads(json.dumps(plain, default=os.fspath))
        except TypeError:
            saved[key] = {IN_PYTHON: type(value).__name__}
    return saved


def from_saved(path: str | os.PathLike[str], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint, and the arguments that it holds with the given ones in their place.

    Raises:
        UserError: no checkpoint, a damaged one, one without arguments, or one that asks for some of them.
    """
    key, remedy = "checkpoint_path", "Choose a file that training wrote."
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        held = checkpoint.get("hyper_parameters", {}) | given
        _ = checkpoint["state_dict"]
    except Exception as error:  # there is no end to what a damaged file makes the reader raise
        found = f"{os.fspath(path)!r}: {type(error).__name__}: {error}"[:300]
        raise UserError(key, "a readable checkpoint of lit_opd", found, remedy) from error
    lacking = [name for name, value in held.items() if isinstance(value, Mapping) and IN_PYTHON in value]
    lacking += [name for name in ("student", "teacher") if name not in held]
    if lacking:
        expected = f"the arguments {', '.join(lacking)}, which the checkpoint does not hold"
        raise UserError(key, expected, "none", f"Pass {lacking[0]}=... too.")
    return checkpoint, held
