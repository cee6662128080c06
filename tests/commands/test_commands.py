"""The other commands, on one finished run; and estimators of a user's own."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd import estimators
from lit_opd.cli import main
from lit_opd.config import load_config
from lit_opd.runs.distillation import evaluate, train

SHORT = ("trainer.max_steps=3", "evaluation.every_n_steps=2", "data.train_size=8", "evaluation.teacher=false")


@pytest.fixture(scope="module")
def finished(make_workspace):
    made = make_workspace("commands", *SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        assert main(made.arguments("fit")) == 0
    return made


@pytest.fixture
def run(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    return finished


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_checkpoint_measures_what_fit_measured_and_nothing_is_written(run, capsys, stage):
    before = contents(run.folder)
    words = run.arguments(stage)
    results = evaluate(load_config([words[2]], words[3:]), str(run.checkpoint), stage)
    expected = json.loads((run.output / "summary.json").read_text())["after"]
    assert {name: interval._asdict() for name, interval in results.items()} == expected
    assert main([*words, "--json", "../numbers.json"]) == 0
    found = json.loads((run.folder.parent / "numbers.json").read_text())
    assert found["metrics"].keys() == expected.keys()
    assert found["metrics"]["accuracy"] == {"variants": {"student": expected["accuracy"]}}
    assert (found["stage"], found["checkpoint"]) == (stage, "run/checkpoints/last.ckpt")
    out = capsys.readouterr().out
    assert f"{stage}: run/checkpoints/last.ckpt" in out
    assert f"{expected['reverse_kl']['mean']:.3f}" in out
    assert contents(run.folder) == before


def test_untrained_measures_the_student_as_it_lies(run, capsys):
    assert main(run.arguments("validate", "--untrained", "--json", "../before.json")) == 0
    assert "validate: " in capsys.readouterr().out
    found = json.loads((run.folder.parent / "before.json").read_text())["metrics"]
    expected = json.loads((run.output / "summary.json").read_text())["before"]
    assert {name: value["variants"]["student"] for name, value in found.items()} == expected


def test_export_writes_what_fit_exported(run, capsys):
    assert main(run.arguments("export", "--checkpoint", "run/checkpoints/last.ckpt", "--out", "exported")) == 0
    assert capsys.readouterr().out.strip() == "exported"
    mine, theirs = run.folder / "exported", run.output / "student"
    assert {file.name for file in mine.iterdir()} == {file.name for file in theirs.iterdir()}
    for file in theirs.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes(), file.name
    shutil.rmtree(mine)


def test_export_merges_lora_into_a_plain_model(workspace):
    lora = "student.lora={r: 2, target_modules: [q_proj], init_lora_weights: false}"
    assert main(workspace.arguments("fit", *SHORT, lora)) == 0
    state = torch.load(workspace.checkpoint, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in state)
    model, info = AutoModelForCausalLM.from_pretrained(workspace.output / "student", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model(torch.arange(3, 17)[None]).logits.isfinite().all()


def test_finished_run_resumed_changes_nothing(run, capsys):
    def lasting():
        return {k: v for k, v in contents(run.output).items() if k.suffix != ".ckpt"}

    before, weights = lasting(), torch.load(run.checkpoint, weights_only=True)
    capsys.readouterr()
    assert main(run.arguments("fit", "--resume", "auto")) == 0
    assert "after 3 steps" in capsys.readouterr().out
    assert lasting() == before
    after = torch.load(run.checkpoint, weights_only=True)
    assert all(torch.equal(after["state_dict"][k], v) for k, v in weights["state_dict"].items())
    (record,) = run.runs
    assert record.info.status == "FINISHED"
    assert len(record.outputs.model_outputs) == 1


def test_more_steps_after_the_end_are_those_of_a_longer_run(workspace):
    constant = ("optim.scheduler=null", "evaluation.teacher=false", "optim.updates_per_rollout=2")
    words = workspace.arguments("fit", *constant)
    straight = train(load_config([words[2]], [*words[3:], "output_dir=straight", "trainer.max_steps=10"]))
    train(load_config([words[2]], [*words[3:], "trainer.max_steps=6"]))
    longer = train(load_config([words[2]], [*words[3:], "trainer.max_steps=10"]), "auto")
    assert longer.steps == straight.steps == 10
    assert (longer.student / "model.safetensors").read_bytes() == (straight.student / "model.safetensors").read_bytes()
    assert longer.after == straight.after


def test_resume_from_a_checkpoint_elsewhere_begins_a_run_of_its_own(run, capsys):
    assert main(run.arguments("fit", "--resume", "run/checkpoints/last.ckpt", "output_dir=continued",
                              "trainer.max_steps=4", "tracking.experiment=continued")) == 0  # fmt: skip
    assert json.loads((run.folder / "continued" / "summary.json").read_text())["steps"] == 4
    (record,) = run.runs
    assert record.info.run_id != json.loads((run.folder / "continued" / "run.json").read_text())["mlflow_run_id"]
    shutil.rmtree(run.folder / "continued")


def test_resume_from_a_checkpoint_does_not_write_over_another_run(run, capsys):
    shutil.copy(run.checkpoint, "elsewhere.ckpt")
    assert main(run.arguments("fit", "--resume", "elsewhere.ckpt")) == 2
    assert "another run" in capsys.readouterr().err
    (run.folder / "elsewhere.ckpt").unlink()


def test_estimators_lists_the_registry(capsys, monkeypatch):
    assert main(["estimators", "--markdown"]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == estimators.names()
    assert all(row.count(" | ") == 6 for row in rows)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["estimators"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in estimators.names())


MINE = """
from lit_opd import register_estimator
from lit_opd.types import Estimate

def clipped_reverse_kl(tokens, *, max_log_ratio=5.0):
    ratio = (tokens.student_logps_BT.detach() - tokens.teacher_logps_BT).clamp(-max_log_ratio, max_log_ratio)
    return Estimate(loss_BT=ratio * tokens.student_logps_BT, kl_BT=ratio)

@register_estimator("clipped_{name}", target="reverse_kl", source="me")
def decorated(tokens, *, max_log_ratio=5.0):
    return clipped_reverse_kl(tokens, max_log_ratio=max_log_ratio)
"""


@pytest.mark.parametrize("reference", ["{file}.py:clipped_reverse_kl", "{file}.py:decorated", "{file}:decorated"])
def test_estimator_of_ones_own(workspace, monkeypatch, reference):
    name = f"mine_{abs(hash(reference))}"
    (workspace.folder / f"{name}.py").write_text(MINE.format(name=name))
    monkeypatch.syspath_prepend(workspace.folder)
    reference = reference.format(file=name)
    words = (f"estimator.name={reference}", "estimator.kwargs.max_log_ratio=3")
    assert main(workspace.arguments("fit", *SHORT, *words)) == 0
    (record,) = workspace.runs
    assert record.data.tags["estimator"] == reference
    assert record.data.params["estimator.kwargs.max_log_ratio"] == "3"
    assert "estimator.kwargs.divergence" not in record.data.params


def test_keyword_of_ones_own_is_checked(workspace, capsys):
    (workspace.folder / "mine.py").write_text(MINE.format(name="x"))
    assert main(workspace.arguments("fit", "estimator.name=mine.py:decorated", "estimator.kwargs.max_ratio=3")) == 2
    assert "Did you mean 'max_log_ratio'?" in capsys.readouterr().err


def test_a_run_says_what_it_is_and_keeps_the_last_completions(run, capsys):
    words = run.arguments("fit", "output_dir=again", "evaluation.num_completions=1", "evaluation.pass_at=[1]")
    assert main(words) == 0
    printed = capsys.readouterr()
    banner, rest = printed.err.splitlines()[:5], printed.err.splitlines()[5:]
    assert [line.split()[0] for line in banner] == ["student", "teacher", "estimator", "data", "run"]
    assert "0.22M parameters, all of them train" in banner[0]
    assert banner[2].endswith("the gradient of reverse_kl, unbiased")
    assert "8 prompts, 4 x 2 completions a step; 6 held out" in banner[3]
    assert "3 steps on cpu, 1 process, 32-true; again, MLflow experiment 'tests', run " in banner[4]
    assert "step 0: measuring the student" in rest  # plain lines: this is no terminal
    assert [line.partition(":")[0].split(",")[0] for line in rest if "left" in line] == ["step 1/3"]
    assert not any("\r" in line for line in rest)

    after = json.loads((run.folder / "again" / "summary.json").read_text())["after"]
    rows = [json.loads(line) for line in (run.folder / "again" / "completions.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(6))
    assert sum(row["reward"] for row in rows) / 6 == pytest.approx(after["accuracy"]["mean"])
    assert sum(row["tokens"] for row in rows) / 6 == pytest.approx(after["length"]["mean"])
    assert sum(row["truncated"] for row in rows) / 6 == pytest.approx(after["truncated_frac"]["mean"])
    tokens = sum(row["tokens"] for row in rows)
    assert sum(row["reverse_kl"] * row["tokens"] for row in rows) / tokens == pytest.approx(after["reverse_kl"]["mean"])
    assert -sum(row["teacher_logp"] for row in rows) / tokens == pytest.approx(after["teacher_nll"]["mean"])
    shutil.rmtree(run.folder / "again")


def test_a_dry_run_does_all_but_a_step_and_writes_nothing(run, capsys):
    before = contents(run.folder)
    assert main(run.arguments("fit", "--dry-run", "output_dir=new")) == 0
    out = capsys.readouterr().out
    told = {line.split()[0]: line for line in out.splitlines()}
    assert {"student", "teacher", "estimator", "data", "run", "prompt", "tokens", "paths", "memory"} <= {*told}
    assert re.search(r"'<bos>\d+\+\d+=', \d tokens$", told["prompt"])
    assert "17 ids, the same for student and teacher" in told["tokens"]
    assert contents(run.folder) == before
    assert not (run.folder / "new").exists()
    assert main(run.arguments("fit", "--dry-run", "output_dir=new", "estimator.name=nothing")) == 2
    assert "error: estimator.name" in capsys.readouterr().err
    assert main(run.arguments("fit", "--dry-run", "--resume", "auto")) == 0
    assert "has ended after 3 steps. Nothing is left to do." in capsys.readouterr().out
