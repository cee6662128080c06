"""A run that is killed and resumed ends as one that nobody disturbed. `python -m tools.kills` tries every point."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_write_or_time_resumes_to_the_same_end(warm_python):
    """Here at every ninth write and one time."""
    command = [warm_python, "-m", "tools.kills", "--every", "9", "--times", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *points = done.stdout.splitlines()
    assert first.startswith("undisturbed: ")
    assert len(points) >= 5
    assert all(point.endswith(": the same end") for point in points), done.stdout
