"""Print on where nobody reads any more, or where the disk of a log is full.

Why here: `| head` closes the pipe, and Python then ends a program in an error, in the middle or at its end. The command
line calls it first.
"""

from __future__ import annotations

import errno
import io
import os
import sys

__all__ = ["outlive_readers"]


class _LastingFile(io.FileIO):
    """The file of a standard stream, which swallows what cannot be written, and says so where a disk is full."""

    def write(self, text: object) -> int:
        try:
            return super().write(text)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
                raise
            if error.errno == errno.ENOSPC and self.fileno() == 1:
                print(f"warning: standard output: {error.strerror}. What follows is not printed.", file=sys.stderr)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(text))  # type: ignore[arg-type]


def outlive_readers() -> None:
    """Have standard output and error go to nowhere once they cannot be written to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody has replaced it, as tests do
        stream.flush()
        buffer = io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False))
        lasting = io.TextIOWrapper(
            buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip
        setattr(sys, name, lasting)
        setattr(sys, f"__{name}__", lasting)  # Python flushes this one at its end
