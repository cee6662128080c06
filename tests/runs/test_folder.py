"""What a run's folder may hold before, and what becomes of it: nothing is replaced, nothing is written twice."""

import json
import shutil

import torch

from lit_opd.cli import main
from lit_opd.config import PACKAGE_FOLDER, load_config
from lit_opd.files import only_one

SHORT = ("trainer.max_steps=2", "evaluation.every_n_steps=1", "rollout.max_new_tokens=4", "data.validation_size=2",
         "tracking.system_metrics=false", "evaluation.teacher=false", "optim.warmup_steps=0")  # fmt: skip


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def mistake(words, capsys):
    capsys.readouterr()
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_a_finished_run_that_is_resumed_changes_nothing_at_all(workspace, capsys):
    words = workspace.arguments("fit", *SHORT)
    assert main(words) == 0
    (run,), before = workspace.runs, files(workspace.output)
    out = capsys.readouterr().out
    assert main([*words, "--resume", "auto", "diagnostics.every_n_steps=7"]) == 0
    assert capsys.readouterr().out == out
    assert files(workspace.output) == before
    (after,) = workspace.runs
    assert after.to_dictionary() == run.to_dictionary()

    damaged = bytearray(workspace.checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    workspace.checkpoint.write_bytes(damaged)
    for command, key in (("fit", "--resume"), ("validate", "--checkpoint"), ("export", "--checkpoint")):
        given = [key, str(workspace.checkpoint)]
        told = mistake(workspace.arguments(command, *SHORT, *given), capsys)
        assert told.startswith(f"{key}: expected a readable checkpoint, found '{workspace.checkpoint}': its part ")
    workspace.checkpoint.write_bytes(before[workspace.checkpoint.relative_to(workspace.output)])

    for notes in ("", "[]", '{"mlflow_run_id": 5}', '{"before": {"accuracy": "high"}}'):
        (workspace.output / "run.json").write_text(notes)
        assert main([*words, "--resume", "auto", "trainer.max_steps=3"]) == 0
        assert "run.json is damaged" in capsys.readouterr().err or notes != ""
        assert json.loads((workspace.output / "run.json").read_text())["ended"] == "FINISHED"


def test_nothing_is_replaced_that_no_run_of_the_folder_made(workspace, capsys):
    output = workspace.output
    shutil.copytree(PACKAGE_FOLDER / "tiny" / "student", output / "student")
    before = files(output)
    for words in ([], ["--resume", "auto"], [f"student.path={output}/student"]):
        told = mistake(workspace.arguments("fit", *SHORT, *words), capsys)
        assert told.startswith(
            "output_dir: expected a folder where nothing would be replaced, found 'run', which holds"
        )
    torch.save({"state_dict": {}}, workspace.folder / "any.ckpt")
    words = ["--checkpoint", "any.ckpt", f"student.path={output}/student"]
    assert "which is student.path" in mistake(workspace.arguments("export", *words), capsys)
    words[-1] = f"--out={output}/student"
    assert "expected a folder that is new or empty" in mistake(workspace.arguments("export", *words), capsys)
    assert files(output) == before
    shutil.rmtree(output)
    output.mkdir()
    (output / "summary.json").write_text("{}")
    assert "which holds summary.json of something else" in mistake(workspace.arguments("fit", *SHORT), capsys)

    (output / "summary.json").unlink()
    with only_one("output_dir", output):
        for words in ([], ["--resume", "auto"]):
            assert "that nobody is at work in" in mistake(workspace.arguments("fit", *SHORT, *words), capsys)
    assert not workspace.runs


BROKEN = """
import lightning as L
from lit_opd.errors import UserError

class Late(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise UserError("mine", "something else", "this", "Correct it.") if self.step < 2 else ValueError("a bug")
"""


def test_a_mistake_before_the_first_step_leaves_nothing_and_a_failure_a_folder_to_use_again(workspace, capsys):
    (workspace.folder / "mine.py").write_text(BROKEN)
    words = workspace.arguments("fit", *SHORT)

    def late(step):
        return [*words, f"callbacks=[{{path: mine.py:Late, kwargs: {{step: {step}}}}}]"]

    assert mistake(late(0), capsys).startswith("mine: expected something else")
    assert not workspace.output.exists()
    assert not workspace.runs
    workspace.output.mkdir()
    assert mistake(late(0), capsys)
    assert not list(workspace.output.iterdir())
    assert main(late(1)) == 1  # there is a step: a checkpoint of it, and files that tell of it
    assert "failed: mine: expected something else" in capsys.readouterr().err
    assert mistake(words, capsys).startswith("output_dir: expected a new folder")
    before = files(workspace.output)
    assert mistake([*late(1), "--resume", "auto"], capsys)
    assert files(workspace.output) == before
    shutil.rmtree(workspace.output)
    assert main([*late(1), "evaluation.every_n_steps=9"]) == 1
    assert not workspace.checkpoint.exists()
    assert main(words) == 0
    assert [run.info.status for run in workspace.runs] == ["FINISHED", "FAILED", "FAILED"]


def test_a_home_and_variables_are_expanded_before_anybody_sees_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", "/models")
    words = ["output_dir=~/run", "student.path=$MODELS/s", "teacher.path=~/t", "data.path=~/p.jsonl"]
    config = load_config([], [*words, "tracking.uri=sqlite:///~/runs.db", "data.prompt_template=~ $MODELS {prompt}"])
    assert config.output_dir == f"{tmp_path}/run"
    assert config.student.path == "/models/s"
    assert config.teacher.path == f"{tmp_path}/t"
    assert config.data.path == f"{tmp_path}/p.jsonl"
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs.db"
    assert config.data.prompt_template == "~ $MODELS {prompt}"
