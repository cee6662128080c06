"""A program whose output nobody reads, or fits no disk any more, ends as if somebody did."""

import subprocess
import sys

import pytest

HELP = [sys.executable, "-m", "lit_opd", "--help"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_is_no_failure(stream, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    words = HELP if stream == "stdout" else [*HELP[:-1], "nonsense"]
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    program = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    getattr(program, stream).close()
    assert program.wait(60) == (0 if stream == "stdout" else 2)
    assert getattr(program, other).read() == ""


def test_a_full_disk_for_the_output_is_told_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("warning: standard output: No space left on device")) == (0, True)
