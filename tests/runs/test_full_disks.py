"""Small disks that fill up before, in and after training: one line, no weights lost, and the run goes on or resumes.

The faults of the tracker are in tests/tracking/test_faults.py, those of verifiers, data and plug-ins in
tests/data/test_guarded.py and tests/runs/test_own_parts.py, a full standard output in tests/test_streams.py.
"""

import os
import re
import shutil
import subprocess
from collections import Counter

import pytest
import torch

from lit_opd.cli import main

SHORT = ("trainer.max_steps=3", "evaluation.every_n_steps=2", "evaluation.teacher=false", "rollout.max_new_tokens=4",
         "data.validation_size=2", "tracking.system_metrics=false", "optim.warmup_steps=0")  # fmt: skip
PHASES = {"before": "validate student 0", "in": "step 1", "after": "validate student 3"}


@pytest.fixture
def disk(workspace):
    """A folder that is a disk of 24 MB."""
    folder = workspace.folder / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    try:
        mounted = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no small disk can be made here: {error}")
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def filling(workspace, disk, phase, *words):
    """Run the command while the disk gets full in a phase; return its exit code, and make room again."""
    at = f"callbacks=[{{path: phases:At, kwargs: {{where: {PHASES[phase]}, disk: {disk}}}}}]"
    code = main(workspace.arguments("fit", *SHORT, *words, at))
    (disk / "filling").unlink()
    return code


@pytest.mark.parametrize(("phase", "step"), [("before", None), ("in", None), ("after", 3)])
def test_a_run_whose_folder_gets_full_fails_in_one_line_and_is_resumed(workspace, disk, capsys, phase, step):
    (words, checkpoint) = [f"output_dir={disk / 'run'}"], disk / "run" / "checkpoints" / "last.ckpt"
    assert filling(workspace, disk, phase, *words) == 1
    (failed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert re.match(r"failed: \S+/(run\.json|last\.ckpt|student) cannot be written, for no space is left", failed)
    assert [run.info.status for run in workspace.runs] == ["FAILED"]
    assert not list(disk.rglob("*.part"))
    assert checkpoint.is_file() == (step is not None)
    if step is not None:
        assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    assert main(workspace.arguments("fit", *SHORT, *words, "--resume", "auto")) == 0
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    assert [run.info.status for run in workspace.runs] == ["FINISHED"]
    assert whole(workspace)


@pytest.mark.parametrize(
    ("what", "phase"), [("database", "before"), ("database", "in"), ("artifacts", "in"), ("artifacts", "after")]
)
def test_a_run_ends_well_where_the_disk_of_its_tracker_gets_full(workspace, disk, capsys, what, phase):
    place = {"database": "mlflow.db", "artifacts": "mlruns"}[what]
    if what == "database":
        shutil.move(workspace.folder / place, disk / place)
    else:
        (disk / place).mkdir()
    os.symlink(disk / place, workspace.folder / place)
    assert filling(workspace, disk, phase) == 0
    err = capsys.readouterr().err
    failed, left = re.findall(r"warning: (MLflow .*)", err)
    assert "fails: " in failed
    assert "python -m lit_opd sync" in left
    assert "Traceback" not in err
    assert main(workspace.arguments("sync", *SHORT)) == 0
    assert [run.info.status for run in workspace.runs] == ["FINISHED"]
    assert whole(workspace)


def whole(workspace):
    """MLflow has every point of the run once, and its files."""
    (run,), client = workspace.runs, workspace.client
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    points = Counter((name, point.step) for name, history in histories.items() for point in history)
    trained, measured = ({step for name, step in points if name == key} for key in ("train/loss", "val/reverse_kl"))
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    told_once = set(points.values()) == {1} and (trained, measured) == ({1, 2, 3}, {0, 2, 3})
    return told_once and {"completions.json", "summary.json", "prompts.json"} <= files
