"""Take what a script in Python gives for a model and its tokenizer: a path, a section's keys, or the thing itself.

`DistillationModule` calls it first, so that what is none of these is told by its name. Its checkpoints hold what it was
given, so that one can be made of them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_opd.config import FrozenConfig, Section, StudentConfig, TeacherConfig, as_section, check_names
from lit_opd.config.limits import as_type
from lit_opd.errors import UserError
from lit_opd.models.exporting import export_student
from lit_opd.models.language_model import LanguageModel

__all__ = ["Restorable", "as_models", "check_taught_by", "taught_by", "to_saved"]

IN_PYTHON = "given in Python"
# Keys of a teacher that say how it runs. By all others one teacher is told from another.
RUNNING = {
    "dtype", "trust_remote_code", "quantization", "offload", "server", "top_k", "key_variable", "in_flight",
    "timeout_s", "patience_s", "canary_every",
}  # fmt: skip


def as_models(
    student: Any, teacher: Any, reference: Any, scorer: type, teachers: Any = None, **tokenizers: Any
) -> tuple[Any, Any, Any]:
    """Make sections of paths and mappings of keys, and leave sections, models in memory and a `scorer` as they are.

    In the place of the teacher come several `teachers` by name, where they are given.

    Raises:
        UserError: one is none of them, or a section that checks refuse; what was given for a tokenizer is none; one
            teacher and several.
    """
    for key, value in tokenizers.items():
        if value is not None and not hasattr(value, "get_vocab"):
            remedy = "Pass what AutoTokenizer.from_pretrained returns."
            raise UserError(key, "a tokenizer of transformers", f"{value!r:.80}, a {type(value).__name__}", remedy)
    student = _as_model(StudentConfig, student, "student")
    if teachers:
        teacher = _as_teachers(teacher, teachers, scorer)
    elif not isinstance(teacher, scorer):
        teacher = _as_model(TeacherConfig, teacher, "teacher")
    return student, teacher, None if reference is None else _as_model(FrozenConfig, reference, "reference")


def _as_teachers(teacher: Any, teachers: Any, scorer: type) -> dict[str, Any]:
    if teacher is not None:
        raise UserError("teachers", "one teacher, or several", "both", "Leave one of them out.")
    if not isinstance(teachers, Mapping):
        found = f"{teachers!r:.80}, a {type(teachers).__name__}"
        raise UserError("teachers", "a mapping of names to teachers", found, "Pass one.")
    kept = {
        n: one if isinstance(one, scorer) else _as_model(TeacherConfig, one, "teacher") for n, one in teachers.items()
    }
    check_names(kept)
    return kept


def taught_by(teacher: Any, combined: str, schedule: Mapping[str, Any]) -> dict[str, Any]:
    """List several teachers for a checkpoint: what each is, in which order, and how those of one row are combined.

    Where their weights have a `schedule`, it is in the list.
    """
    if not isinstance(teacher, Mapping):
        return {}
    kinds: dict[str, dict[str, Any]] = {name: {"kind": IN_PYTHON} for name in teacher}
    for name, one in teacher.items():
        if isinstance(one, TeacherConfig):
            kinds[name] = {key: value for key, value in vars(one).items() if key not in RUNNING}
    return {"teachers": kinds, "teachers_combined": combined, "teachers_schedule": to_saved(schedule)}


def check_taught_by(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other teachers than those of a checkpoint.

    Raises:
        UserError: they differ in name, kind, path or order, or in the way and the schedule in which they are combined.
    """
    before = checkpoint.get("taught_by", {})
    if before == now:
        return
    old, new = (", ".join(f"{n} ({one.get('path') or one['kind']})" for n, one in told.get("teachers", {}).items())
                for told in (before, now))  # fmt: skip
    expected = f"the teachers of the checkpoint: {old or 'one'}"
    raise UserError("teachers", expected, new or "one", "Set them back, or begin a new run with the exported student.")


def _as_model(schema: type[StudentConfig] | type[FrozenConfig], value: Any, key: str) -> Any:
    if isinstance(value, str | os.PathLike):
        value = schema(path=os.fspath(value))
    if isinstance(value, Mapping | schema):
        return as_section(schema, value, key)
    if isinstance(value, nn.Module) and hasattr(value, "get_output_embeddings"):
        return value
    expected = f"a path, a {schema.__name__} or its keys, or a causal language model of transformers"
    raise UserError(key, expected, f"{value!r:.80}, a {type(value).__name__}", "Pass one of them.")


def to_saved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Write `locals()` of a constructor as plain values for a checkpoint, and mark what lives in Python only."""
    saved: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("self", "__class__"):
            continue
        try:
            saved[key] = json.loads(json.dumps(value, default=_plain))
        except TypeError:
            saved[key] = {IN_PYTHON: type(value).__name__}
    return saved


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Section) else os.fspath(value)  # type: ignore[call-overload]


class Restorable(nn.Module):
    """A module whose checkpoints hold the arguments that it was made with, and whose student can be written."""

    student: LanguageModel

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the student as a Hugging Face folder, as `fit` does at its end, and compare the two."""
        return export_student(self.student, Path(as_type("folder", folder, str)))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **arguments: Any) -> Any:
        """Make the module of a checkpoint again, on the CPU, with `arguments` in the place of those that it holds.

        Raises:
            UserError: no checkpoint, a damaged one, arguments that it does not hold, or another student's weights.
        """
        key, remedy = "checkpoint_path", "Choose a file that training wrote."
        try:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            held, weights = checkpoint.get("hyper_parameters", {}) | arguments, checkpoint["state_dict"]
        except Exception as error:  # there is no end to what a damaged file makes the reader raise
            found = f"{str(checkpoint_path)!r}: {type(error).__name__}: {error}"[:300]
            raise UserError(key, "a readable checkpoint of lit_opd", found, remedy) from error
        lacking = [name for name, value in held.items() if isinstance(value, Mapping) and IN_PYTHON in value]
        lacking += [name for name in ("student", "teacher") if name not in held]
        if lacking:
            expected = f"the arguments {', '.join(lacking)}, which the checkpoint does not hold"
            raise UserError(key, expected, "none", f"Pass {lacking[0]}=... too.")
        module = cls(**held)
        try:
            module.load_state_dict(module.state_dict() | weights)
        except RuntimeError as error:
            raise UserError("student", "the student of the checkpoint", str(error)[:300], "Pass student=...") from error
        return module
