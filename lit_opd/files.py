"""Write files and folders so that a name always stands for something whole: beside the place, then moved there.

Why here: a run may be killed while it writes, or the disk may fill up. Whoever writes into a run's folder calls this,
and so does whoever writes a report or a model folder. `only_one` keeps a second process out of a folder.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_opd.errors import RunError, UserError

__all__ = ["finite", "only_one", "replacing", "write_file"]

BLOCK = 2**16  # bytes; file systems give room out in smaller ones


def write_file(path: Path, content: str | bytes, private: bool = False) -> None:
    """Write a file, whole or not at all, and make the folder that it lies in. Only its owner reads a `private` one."""
    with replacing(path) as part:
        part.touch(mode=0o600 if private else 0o666)
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Put a file or a folder in the place of an older one once it is whole and on the disk.

    Yields:
        Where to write it. If that fails nothing is left of it, and the old one stays.

    Raises:
        RunError: the disk is full.
    """
    part, old = (path.with_name(f"{path.name}.{ending}") for ending in ("part", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not path.exists():  # killed between the two moves below
        os.replace(old, path)
    _remove(part)
    _remove(old)
    try:
        yield part
        for file in part.rglob("*") if part.is_dir() else (part,):
            if file.is_file():
                _sync(file)
        if path.is_dir():  # the system replaces a file in one move, and no folder that holds something
            os.replace(path, old)
        os.replace(part, path)
    except BaseException as error:
        full = isinstance(error, Exception) and _is_full(path.parent, error)
        with suppress(OSError):
            _remove(part)
        if full:
            remedy = "Make room; a run goes on with --resume auto."
            raise RunError(f"{path} cannot be written, for no space is left on its disk. {remedy}") from error
        raise
    _sync(path.parent)
    _remove(old)


@contextmanager
def only_one(key: str, folder: Path) -> Iterator[int]:
    """Make a folder, and keep other processes that ask here out of it.

    Yields:
        The descriptor of the lock, for processes to inherit that go on after this one.

    Raises:
        UserError: the folder cannot be made, or somebody is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(key, "a folder that can be written to", str(error), "Choose another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = f"{str(folder)!r}, where another process, or one that it started, is at work"
            remedy = f"Wait for it, stop it, or set {key} to another folder."
            raise UserError(key, "a folder that nobody is at work in", found, remedy) from error
        yield file.fileno()


def _is_full(folder: Path, error: Exception) -> bool:
    """Find out whether a full disk is what made a writer fail. Those of torch and safetensors do not say so."""
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return told or shutil.disk_usage(folder).free < BLOCK


def finite(node: Any) -> Any:
    """Put null, in values for a file of JSON, for every number that is not finite, for which JSON has no word."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
