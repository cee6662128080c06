"""Signals to a run of several processes: whichever gets them, the first one ends them all."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, subprocess, sys, time
from lit_opd.stopping import Stopped, heeding

with heeding():
    if "LOCAL_RANK" not in os.environ:
        second = subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"LOCAL_RANK": "1"})
    print(os.getpid(), flush=True)
    try:
        time.sleep(60)
    except Stopped as stop:
        time.sleep(0.5)  # in which it tells MLflow, and the second passes on what it got
        second.kill()
        sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("to", ["first", "second", "all"])
def test_a_signal_to_any_process_ends_the_first_one_in_order(write, to):
    command, environment = [sys.executable, write("program.py", PROGRAM)], {**os.environ}
    environment.pop("LOCAL_RANK", None)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        pids = {int(first.stdout.readline()) for _ in range(2)}
        told = {"first": {first.pid}, "second": pids - {first.pid}, "all": pids}[to]
        for pid in told:
            os.kill(pid, signal.SIGTERM)
        _, err = first.communicate(timeout=20)
    assert (first.returncode, err) == (143, "")
