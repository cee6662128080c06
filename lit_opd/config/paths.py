"""Expand `~` and variables of the environment in the paths of a configuration, once and before anybody sees them.

Why here: what expands a path by itself finds one folder, and what does not makes another of the name `~`. `load_as`
calls it.
"""

from __future__ import annotations

from os.path import expanduser, expandvars
from typing import Any

__all__ = ["expand_paths"]

PATHS = ("output_dir", "student.path", "teacher.path", "reference.path", "data.path", "data.validation_path",
         "tracking.uri")  # fmt: skip
FILE = "sqlite:///"


def expand_paths(config: Any) -> None:
    """Expand the paths in a configuration, or in another dataclass that has some of its keys."""
    for key in PATHS:
        section, _, name = key.rpartition(".")
        _expand(getattr(config, section, None) if section else config, name)
    for teacher in getattr(config, "teachers", {}).values():
        _expand(teacher, "path")


def _expand(holder: Any, name: str) -> None:
    value = getattr(holder, name, None)
    if isinstance(value, str):
        kind = FILE if value.startswith(FILE) else ""
        setattr(holder, name, kind + expanduser(expandvars(value.removeprefix(kind))))
