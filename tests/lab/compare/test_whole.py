"""A comparison as a user makes it: stopped by Ctrl-C, killed, gone on with to its end; and what comes of it."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from lit_opd.cli import main
from lit_opd.config import to_yaml
from lit_opd.lab.compare.collect import collect
from lit_opd.lab.compare.grid import load_comparison, runs_of

pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Story:
    """What was seen after each of three starts, and a run of the same configuration by itself."""

    workspace: object
    runs: list
    again: Path
    codes: list = dataclasses.field(default_factory=list)
    statuses: list = dataclasses.field(default_factory=list)
    reported: list = dataclasses.field(default_factory=list)
    files: list = dataclasses.field(default_factory=list)
    steps: list = dataclasses.field(default_factory=list)
    locked: tuple = ()

    def look(self, code):
        report = self.workspace.folder / "out" / "report" / "report.json"
        self.codes.append(code)
        self.statuses.append({run.info.run_name: (run.info.run_id, run.info.status) for run in self.workspace.runs})
        self.reported.append(json.loads(report.read_text()) if report.is_file() else None)
        first = self.runs[0].folder
        self.files.append({path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()})
        checkpoint = self.runs[1].folder / "checkpoints" / "last.ckpt"
        self.steps.append(torch.load(checkpoint, weights_only=True)["global_step"])


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupt_when(condition):
    def wait():
        wait_for(condition)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(scope="module")
def story(make_workspace, write_comparison):
    workspace = make_workspace("compare")
    file = write_comparison(workspace)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "executable", workspace.python)  # of the runs that are started from here
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield play(workspace, file)
        signal.signal(signal.SIGINT, before)


def play(workspace, file):
    words = ["compare", "--config", str(file)]
    runs = runs_of(load_comparison([file]))
    told = Story(workspace, runs, workspace.folder / "again")
    second = dataclasses.replace(runs[1].config, output_dir=str(told.again))
    by_itself = dataclasses.replace(second, tracking=dataclasses.replace(second.tracking, experiment="by itself"))
    (workspace.folder / "again.yaml").write_text(to_yaml(by_itself))
    again = workspace.start("fit", "--config", "again.yaml", python=workspace.python)

    interrupt_when((runs[1].folder / "checkpoints" / "last.ckpt").is_file)
    told.look(main(words))

    killed = workspace.start(*words)
    wait_for(lambda: dict(told.statuses[0])["full_vocab · seed 0"][0] in running(workspace))
    (child,) = psutil.Process(killed.pid).children()
    killed.kill()
    killed.wait()
    child.suspend()  # so that it is under way for as long as it is looked at, however fast the machine
    told.locked = (main(words), child.status())
    told.look(killed.returncode)
    child.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    killed.communicate()

    told.look(main([*words, "--json", "numbers.json"]))
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    return told


def running(workspace):
    return {run.info.run_id for run in workspace.runs if run.info.status == "RUNNING"}


PARENT, FIRST, SECOND = "comparison of token, full_vocab", "token · seed 0", "full_vocab · seed 0"


def test_ctrl_c_saves_the_run_under_way_marks_it_killed_and_reports_what_was_done(story):
    assert story.codes[0] == 130
    assert {name: status for name, (_, status) in story.statuses[0].items()} == {
        PARENT: "KILLED", FIRST: "FINISHED", SECOND: "KILLED",
    }  # fmt: skip
    assert 10 <= story.steps[0] < 40
    reported = story.reported[0]
    assert (reported["variants"], reported["prompts"]) == (["token", "full_vocab"], 6)
    assert {variant for found in reported["metrics"].values() for variant in found["variants"]} == {"token"}
    (stopped,) = reported["left_out"]
    assert (stopped["variant"], stopped["status"]) == ("full_vocab", "KILLED")
    assert stopped["why"] == f"killed after {story.steps[0]} steps"


def test_after_a_kill_a_run_that_outlived_it_keeps_others_out(story):
    assert story.codes[1] == -signal.SIGKILL
    assert story.locked == (2, psutil.STATUS_STOPPED)
    assert {name: status for name, (_, status) in story.statuses[1].items()} == {
        PARENT: "RUNNING", FIRST: "FINISHED", SECOND: "RUNNING",
    }  # fmt: skip


def test_going_on_makes_nothing_twice(story):
    assert story.codes[2] == 0
    assert story.files[0] == story.files[1] == story.files[2]
    ids = [{name: run_id for name, (run_id, _) in seen.items()} for seen in story.statuses]
    assert ids[0] == ids[1] == ids[2], "every run is one MLflow run"
    assert {status for _, status in story.statuses[2].values()} == {"FINISHED"}
    assert story.steps[2] == 40


def test_runs_belong_to_the_comparison_and_the_report_lies_with_it(story):
    client = story.workspace.client
    parent = story.statuses[2][PARENT][0]
    for run in story.runs:
        recorded = client.get_run(story.statuses[2][run.name][0])
        assert recorded.data.tags["mlflow.parentRunId"] == parent
        assert (recorded.data.tags["variant"], recorded.data.tags["seed"]) == (run.variant, "0")
        assert recorded.data.params["estimator.name"] == run.variant
        assert recorded.data.tags["mlflow.runColor"] == {"token": "#0072B2", "full_vocab": "#D55E00"}[run.variant]
    files = {file.path for file in client.list_artifacts(parent, "report")}
    assert files == {f"report/{name}" for name in ("report.json", "report.md", "report.html", "figures")}
    numbers = json.loads((story.workspace.folder / "numbers.json").read_text())
    assert numbers == story.reported[2]
    assert numbers["budget"] == "40 optimizer steps"
    assert numbers["left_out"] == []
    assert {len(found["variants"]) for found in numbers["metrics"].values()} == {2}
    assert numbers["made"]["student"] == story.runs[0].config.student.path
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    assert "| `token` |" in note
    assert "*untrained student*" in note


def test_what_is_collected_is_what_the_runs_measured(story):
    parent = story.statuses[2][PARENT][0]
    results = collect(story.workspace.client, [parent])
    assert [r.variant for r in results] == ["token", "full_vocab"]
    assert results[0].prompts == results[1].prompts
    assert len(set(results[0].prompts)) == 6
    for run, result in zip(story.runs, results, strict=True):
        table = json.loads((run.folder / "prompts.json").read_text())
        summary = json.loads((run.folder / "summary.json").read_text())
        assert result.per_prompt.keys() == summary["after"].keys()
        for name, interval in summary["after"].items():
            assert sum(table["sums"][name]) / sum(table["weights"][name]) == pytest.approx(interval["mean"], rel=1e-12)
            points = result.curves[name]
            assert [point.step for point in points] == [0, *range(10, 41, 10)]
            assert points[0].value == pytest.approx(summary["before"][name]["mean"], rel=1e-6)
            assert points[-1].value == pytest.approx(interval["mean"], rel=1e-6)
        ends = [(point.tokens, point.seconds) for point in result.curves["reverse_kl"]]
        assert ends == sorted(ends)
        assert ends[-1] == (result.cost["tokens"], result.cost["seconds"])
        assert result.cost["steps"] == 40
        lengths = story.workspace.client.get_metric_history(result.run_id, "rollout/length")
        tokens = {point.step: 4 * point.value for point in sorted(lengths, key=lambda point: point.timestamp)}
        assert result.cost["tokens"] == pytest.approx(sum(tokens.values()), rel=1e-4)


def test_a_run_that_was_stopped_killed_and_resumed_measures_what_one_by_itself_does(story):
    """Two runs of one configuration and seed: the same numbers of every prompt, to the bit."""
    resumed = json.loads((story.runs[1].folder / "prompts.json").read_text())
    by_itself = json.loads((story.again / "prompts.json").read_text())
    assert resumed == by_itself
    other = json.loads((story.runs[0].folder / "prompts.json").read_text())
    assert other["sums"] != resumed["sums"]
    assert other["prompts"] == resumed["prompts"]
