"""Processes of runs: in turn or at once, failing, stopped, locked; a script stands in for `python -m lit_opd`."""

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from lit_opd.cli import main
from lit_opd.errors import UserError
from lit_opd.files import only_one
from lit_opd.lab.compare.preflight import check_recorded
from lit_opd.lab.compare.runs import PARENT, begin_parent, is_finished, make_runs

# What it is called with: -m lit_opd fit --config FILE --resume auto.
PRELUDE = '#!/bin/sh\n[ "$1 $2 $3 $4 $6 $7" = "-m lit_opd fit --config --resume auto" ] || exit 9\nrun=${5%.yaml}\n'


@pytest.fixture
def stand_in(workspace, monkeypatch):
    """Puts a shell script in the place of Python; it knows its run's folder as $run."""

    def place(script):
        file = workspace.folder / "stand_in"
        file.write_text(PRELUDE + script)
        file.chmod(0o755)
        monkeypatch.setattr("lit_opd.lab.compare.runs.sys.executable", str(file))

    return place


@pytest.fixture
def make(workspace, make_comparison):
    """Makes the runs of a comparison; returns whether it was interrupted, its parent and its runs."""

    def run(**keys):
        comparison, runs = make_comparison(**keys)
        with only_one("output_dir", workspace.folder / "out") as lock:
            parent = begin_parent(comparison, workspace.client)
            return make_runs(comparison, runs, workspace.client, parent, lock), parent, runs

    return run


def children(workspace, parent):
    return {run.data.tags["variant"]: run for run in workspace.runs if run.data.tags.get(PARENT) == parent}


def finish(workspace, run, parent):
    """Leave behind what a finished run does."""
    made = workspace.client.create_run(workspace.client.get_run(parent).info.experiment_id, tags={PARENT: parent})
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps({"mlflow_run_id": made.info.run_id}))
    (run.folder / "summary.json").write_text("{}")
    workspace.client.set_terminated(made.info.run_id, "FINISHED")
    return made.info.run_id


def ask_to_stop(when, times=1):
    """Send this process SIGINT, as often as asked, once a condition holds."""

    def wait():
        while not when():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_that_fails_before_it_is_recorded_stops_no_other_and_is_recorded(workspace, make, stand_in, capfd):
    stand_in('case $run in */token/*) echo noise; echo "error: no [such] thing"; exit 2;; esac')
    interrupted, parent, runs = make()
    assert not interrupted
    told = capfd.readouterr().err
    assert f"failed: token · seed 0: error: no [such] thing (all of it: {runs[0].log})" in told
    assert "done: full_vocab · seed 0" in told
    (failed,) = children(workspace, parent).values()
    assert (failed.info.status, failed.data.tags["variant"], failed.data.tags["seed"]) == ("FAILED", "token", "0")


def test_a_run_that_dies_without_a_word_is_a_failed_run(workspace, make, stand_in, make_comparison):
    comparison, (run,) = make_comparison(variants=["token"])
    with only_one("output_dir", workspace.folder / "out"):
        parent = begin_parent(comparison, workspace.client)
    run_id = finish(workspace, run, parent)
    workspace.client.update_run(run_id, status="RUNNING")
    stand_in("kill -9 $$")
    assert make(variants=["token"])[0] is False
    assert workspace.client.get_run(run_id).info.status == "FAILED"


def test_finished_runs_are_not_made_again(workspace, make, stand_in, make_comparison, capfd):
    comparison, runs = make_comparison()
    with only_one("output_dir", workspace.folder / "out"):
        parent = begin_parent(comparison, workspace.client)
    finish(workspace, runs[0], parent)
    stand_in('echo made > "$run.made"')
    assert make()[1] == parent
    assert [run.folder.with_suffix(".made").exists() for run in runs] == [False, True]
    assert is_finished(runs[0], workspace.client)
    for file in ("summary.json", "run.json"):
        kept = (runs[0].folder / file).read_text()
        (runs[0].folder / file).unlink()
        assert not is_finished(runs[0], workspace.client)
        (runs[0].folder / file).write_text(kept)
    workspace.client.update_run(json.loads(kept)["mlflow_run_id"], status="KILLED")
    assert not is_finished(runs[0], workspace.client)


def test_a_finished_run_joins_the_comparison_that_finds_it(workspace, make, stand_in, make_comparison):
    """Under a new parent, as the notes of the old one were deleted, and under a label that was renamed."""
    before, (run,) = make_comparison(variants={"full vocab": ["estimator.name=full_vocab"]})
    with only_one("output_dir", workspace.folder / "out"):
        parent = begin_parent(before, workspace.client)
    run_id = finish(workspace, run, parent)
    (workspace.folder / "out" / "comparison.json").unlink()
    stand_in("exit 1")
    interrupted, new, _ = make(variants={"full-vocab": ["estimator.name=full_vocab"]})
    assert not interrupted
    assert new != parent
    tags = workspace.client.get_run(run_id).data.tags
    assert (tags[PARENT], tags["variant"]) == (new, "full-vocab")


def test_a_run_that_mlflow_lost_is_told_before_anything_happens(workspace, make_comparison):
    comparison, runs = make_comparison()
    with only_one("output_dir", workspace.folder / "out"):
        run_id = finish(workspace, runs[0], begin_parent(comparison, workspace.client))
    check_recorded(runs, workspace.client)
    workspace.client.delete_run(run_id)
    told = (
        rf"output_dir: expected the MLflow run of 'token · seed 0' in .*, found {run_id}, which was deleted there. .*"
    )
    with pytest.raises(UserError, match=told + r"delete '.*seed-0' to make that run anew"):
        check_recorded(runs, workspace.client)
    (runs[0].folder / "run.json").write_text('{"mlflow_run_id": "0123456789abcdef"}')
    with pytest.raises(UserError, match="found 0123456789abcdef, .*not found"):
        check_recorded(runs, workspace.client)


@pytest.mark.parametrize(("parallel", "threads"), [(1, "unset"), (2, "4"), (3, "2")])
def test_runs_at_once_share_the_threads(workspace, make, stand_in, monkeypatch, parallel, threads):
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (workspace.folder / "here").mkdir()
    # Each waits, two seconds at most, until as many are here as should be; and tells how many there were.
    stand_in(f"""here={workspace.folder}/here
    touch $here/$$
    for _ in $(seq 40); do [ $(ls $here | wc -l) -ge {parallel} ] && break; sleep 0.05; done
    sleep 0.3
    echo $(ls $here | wc -l) ${{OMP_NUM_THREADS:-unset}}
    rm $here/$$""")
    _, _, runs = make(variants=["token", "full_vocab", "sequence"], parallel=parallel)
    told = [run.log.read_text().split() for run in runs]
    assert all(word == threads for _, word in told)
    assert max(int(count) for count, _ in told) == parallel


def test_ctrl_c_reaches_every_run_once_and_no_other_begins(workspace, make, stand_in):
    stand_in("""trap 'echo asked; stop=yes' INT
    touch $run.begun
    while [ -z "$stop" ]; do sleep 0.05; done
    sleep 0.5
    exit 130""")
    begun = [workspace.folder / "out" / "runs" / name / "seed-0.begun" for name in ("token", "full_vocab")]
    thread = ask_to_stop(lambda: all(file.exists() for file in begun))
    interrupted, parent, runs = make(variants=["token", "full_vocab", "sequence"], parallel=2)
    thread.join()
    assert interrupted
    assert [run.log.read_text() if run.log.exists() else None for run in runs] == ["asked\n", "asked\n", None]
    assert children(workspace, parent) == {}, "what was stopped before it was recorded did not fail"


def test_the_third_ctrl_c_kills_what_does_not_listen(workspace, make, stand_in):
    stand_in("trap '' INT; touch $run.begun; sleep 60 & wait; sleep 60")
    thread = ask_to_stop((workspace.folder / "out" / "runs" / "token" / "seed-0.begun").exists, times=3)
    before = time.monotonic()
    assert make()[0] is True
    thread.join()
    assert time.monotonic() - before < 30


def test_signals_are_given_back(make, stand_in):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stand_in("exit 0")
    make()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_one_comparison_at_a_time_also_when_a_run_outlived_the_last_one(tmp_path):
    with only_one("output_dir", tmp_path) as lock:
        with pytest.raises(UserError, match="output_dir: expected a folder that nobody is at work in"):
            only_one("output_dir", tmp_path).__enter__()
        left = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    with pytest.raises(UserError, match="or one that it started, is at work"):
        only_one("output_dir", tmp_path).__enter__()
    left.kill()
    left.wait()
    with only_one("output_dir", tmp_path):
        pass


def test_the_parent_is_found_again_or_its_absence_told(workspace, make_comparison):
    comparison, _ = make_comparison()
    (workspace.folder / "out").mkdir()
    parent = begin_parent(comparison, workspace.client)
    workspace.client.set_terminated(parent, "KILLED")
    assert begin_parent(comparison, workspace.client) == parent
    run = workspace.client.get_run(parent)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "comparison of token, full_vocab")
    assert [file.path for file in workspace.client.list_artifacts(parent)] == ["comparison.yaml"]
    moved = replace(comparison, tracking=replace(comparison.tracking, experiment="other"))
    with pytest.raises(UserError, match="tracking.experiment: expected 'tests', in which .*, found 'other'. Set it"):
        begin_parent(moved, workspace.client)
    (workspace.folder / "out" / "comparison.json").write_text('{"mlflow_run_id": "0123456789abcdef"}')
    with pytest.raises(UserError, match=r"tracking.uri: expected an MLflow store .*0123456789abcdef.*delete .*json"):
        begin_parent(comparison, workspace.client)


def test_failed_runs_are_told_by_the_exit_code_and_leave_no_report(workspace, write_comparison, stand_in, capfd):
    stand_in("echo 'failed: not finite'; exit 1")
    file = write_comparison(workspace, tracking={"uri": workspace.uri, "experiment": "tests", "run_name": "mine"})
    assert main(["compare", "--config", str(file)]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: 2 of 2 runs: token · seed 0, full_vocab · seed 0.")
    assert {run.info.status for run in workspace.runs} == {"FAILED"}
    assert "mine" in {run.info.run_name for run in workspace.runs}
    assert not (workspace.folder / "out" / "report").exists()
