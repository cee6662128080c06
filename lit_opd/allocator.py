"""How the C library keeps memory between steps, which a process can be told only before it begins.

Tensors on a CPU come from glibc's malloc. By its defaults what is above 32 MiB comes from the system page by page and
goes back to it, several hundred MB a step; and its per-thread cache holds the small remainders of aligned blocks, which
keeps what is freed on both sides of them from becoming one block again. Source: "Memory Allocation Tunables" of glibc's
manual, and its bug 14581.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

__all__ = ["begin_again", "settings"]

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLES = {"tcache_count": 0, "mmap_threshold": 2**31 - 1, "trim_threshold": 2**31 - 1}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variable for processes that train on a CPU.

    Empty where it would do nothing (another system than Linux with glibc), and where the user has chosen: any
    `MALLOC_*` or `GLIBC_TUNABLES`, be it empty, stays as it is.
    """
    chosen = _VARIABLE in environment or any(name.startswith("MALLOC_") for name in environment)
    if chosen or platform.libc_ver()[0] != "glibc":
        return {}
    return {_VARIABLE: ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}


def begin_again() -> None:
    """Start this process anew with `settings`, the same arguments and the same number, unless it has them already."""
    wanted = settings(os.environ)
    if wanted:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
