"""`fit --profile` as a user starts it, and what a run says of its speed."""

import json
import re
from statistics import median

import pytest

from lit_opd.cli import main
from lit_opd.commands.running import perf_line

FEW = ("trainer.max_steps=5", "evaluation.every_n_steps=9", "evaluation.teacher=false", "tracking.system_metrics=false")


@pytest.fixture(scope="module")
def profiled(make_workspace):
    made = make_workspace("profiled")
    done = made.run(*made.arguments("fit", "--profile", *FEW))
    assert done.returncode == 0, done.stderr
    return made, done


def test_breakdown_and_trace_are_artifacts_of_the_run(profiled):
    workspace, done = profiled
    (run,) = workspace.runs
    assert run.info.status == "FINISHED"
    names = {artifact.path for artifact in workspace.client.list_artifacts(run.info.run_id, "profile")}
    assert names == {f"profile/{name}" for name in ("phases.json", "phases.md", "trace.json.gz")}
    found = json.loads((workspace.output / "profile" / "phases.json").read_text())
    assert found["steps"] == 3
    assert sum(part["seconds"] for part in found["phases"].values()) == pytest.approx(found["step_s"])


def test_breakdown_is_printed_and_nothing_of_the_profiler_is(profiled):
    _, done = profiled
    assert done.stdout.startswith("profile: run/profile\n\n| phase, mean of 3 ")
    assert "| student/head " in done.stdout
    for noise in ("USDT", "STAGE", "[W"):
        assert noise not in done.stderr


def test_summary_holds_medians_over_steps(profiled):
    workspace, done = profiled
    perf = json.loads((workspace.output / "summary.json").read_text())["perf"]
    (run,) = workspace.runs
    for name, value in perf.items():
        logged = [metric.value for metric in workspace.client.get_metric_history(run.info.run_id, name)]
        assert len(logged) == 5
        assert value == (max(logged) if name == "perf/peak_memory_mb" else median(logged)), name
    assert perf_line(perf) in done.stdout.splitlines()


def test_perf_line_gives_shares_of_the_step():
    perf = {"step_s": 2.0, "rollout_s": 1.0, "teacher_s": 0.2, "student_s": 0.7, "tokens_per_s": 1234.4,
            "peak_memory_mb": 567.8}  # fmt: skip
    assert perf_line({f"perf/{name}": value for name, value in perf.items()}) == (
        "median step: 2.000 s (rollout 50%, teacher 10%, student 35%), 1234 completion tokens/s; peak memory 568 MB"
    )


PRESSED = """
import signal
from lit_opd.types import Estimate

def interrupted(tokens):
    if tokens.progress == 3 / 5:
        signal.raise_signal(signal.SIGINT)
    log_ratio = (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()
    return Estimate(loss_BT=log_ratio * tokens.student_logps_BT, kl_BT=log_ratio)
"""


def test_run_interrupted_while_it_is_recorded_is_killed_and_resumes(workspace, capsys):
    (workspace.folder / "mine.py").write_text(PRESSED)
    own = "estimator.name=mine.py:interrupted"
    assert main(workspace.arguments("fit", "--profile", *FEW, own)) == 130
    assert "--resume auto" in capsys.readouterr().err
    (run,) = workspace.runs
    assert run.info.status == "KILLED"
    assert workspace.checkpoint.is_file()
    assert not (workspace.output / "profile").exists()
    assert main(workspace.arguments("fit", "--profile", "--resume", "auto", *FEW, own)) == 0
    (run,) = workspace.runs
    assert run.info.status == "FINISHED"
    assert re.search(r"\| phase, mean of 1 ", capsys.readouterr().out)


def test_without_the_flag_there_is_no_profile(workspace, capsys):
    assert main(workspace.arguments("fit", *FEW, "trainer.max_steps=1")) == 0
    assert "profile" not in capsys.readouterr().out
    assert not (workspace.output / "profile").exists()


def test_two_profilers_are_refused(workspace, capsys):
    assert main(workspace.arguments("fit", "--profile", "trainer.profiler=pytorch")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --profile: expected trainer.profiler to be null")
    assert "'pytorch'" in line
    assert not workspace.output.exists()


def test_help_tells_of_it(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    assert re.search(r"--profile\s+record where the time", capsys.readouterr().out)
