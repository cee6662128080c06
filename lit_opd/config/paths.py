"""Find the files of a configuration, and expand `~` and variables of the environment in the paths that it holds.

Why here: what expands a path by itself finds one folder, and what does not makes another of the name `~`. `reading`
does it once, before anybody sees a path.
"""

from __future__ import annotations

from os.path import expanduser, expandvars
from pathlib import Path
from typing import Any

from lit_opd.errors import UserError, suggest

__all__ = ["PACKAGE_FOLDER", "config_file", "expand_paths"]

PACKAGE_FOLDER = Path(__file__).parents[1]
SHIPPED = "lit_opd:"
PATHS = ("output_dir", "student.path", "teacher.path", "reference.path", "data.path", "data.validation_path",
         "tracking.uri")  # fmt: skip
FILE = "sqlite:///"


def config_file(name: str | Path) -> Path:
    """Find the YAML file that `--config` names, where `lit_opd:NAME.yaml` comes with the package.

    Raises:
        UserError: there is no such file.
    """
    text = str(name)
    if text.startswith(SHIPPED):
        folder = PACKAGE_FOLDER / "conf"
        known = {f"{SHIPPED}{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*.yaml")}
        if text not in known:
            raise UserError("--config", "a file that comes with the package", repr(text), suggest(text, known))
        return known[text]
    if not Path(name).is_file():
        remedy = "Check the path, or take lit_opd:quickstart.yaml, which comes with the package."
        raise UserError("--config", "a YAML file", f"no file {text!r}", remedy)
    return Path(name)


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
