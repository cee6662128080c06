"""Check the file that `--json` names, for every command that writes its numbers to one."""

from __future__ import annotations

from pathlib import Path

from lit_opd.errors import UserError
from lit_opd.runs.folder import check_writable

__all__ = ["destination"]


def destination(name: str | None) -> Path | None:
    """Check that the file that `--json` names can be written, before minutes of work."""
    if name is None:
        return None
    check_writable("--json", Path(name).parent)
    if Path(name).is_dir():
        raise UserError("--json", "a file", f"{name!r}, a folder", "Name a file in it.")
    return Path(name)
