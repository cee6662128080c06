"""Measurements in processes of their own: how they are started, and how much memory they take.

A process gets its job as JSON on standard input and prints what it found as JSON, on the last line of its output.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

# What README recommends for training on a CPU under Linux: glibc then keeps what a step frees for the next one. By its
# defaults, blocks above 32 MiB go back to the system page by page, and its per-thread cache holds the small remainders
# of aligned blocks, so that their neighbours never become one block again (its bug 14581). Not `mallopt`, which sets
# the thresholds but not the cache: tensors of growing size then take three times the memory.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"
    ":glibc.malloc.mmap_threshold=2147483647:glibc.malloc.trim_threshold=2147483647"
}
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(module: str, job: dict[str, Any], settled: bool = True) -> dict[str, Any]:
    """What a module finds, in a new interpreter; `{"failed": why}` where it does not come to an end.

    Args:
        module: to run.
        job: its input.
        settled: whether its allocator is set as README recommends for training on a CPU.
    """
    command = [sys.executable, "-m", module]
    environment = (ALLOCATOR if settled else {}) | os.environ  # what the user set stays
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    print(result.stderr, file=sys.stderr)
    return {"failed": why_failed(result.returncode, result.stderr)}


def why_failed(code: int, errors: str) -> str:
    """The reason in one line: the last one of the error output, or the signal that ended the process."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (errors.strip().splitlines() or [f"exit code {code}"])[-1]


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be such a process."""
    print(json.dumps(measure(json.load(sys.stdin))))


def resident_mb() -> float:
    """What this process holds in memory now, MB."""
    return psutil.Process().memory_info().rss / 1e6


def peak_mb() -> float:
    """The most it ever held, or since `reset_peak`, MB."""
    if STATUS.exists():  # not getrusage there: it begins with the size of the process that started this one
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def reset_peak() -> None:
    """Forget the peak so far, where the system can: Linux only."""
    if REFERENCES.exists():
        REFERENCES.write_text("5")
