"""Whole runs as a user starts them: to the end, killed and resumed, interrupted and resumed, failing."""

import json
import shutil
import signal
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd import load_config
from lit_opd.config import PACKAGE_FOLDER
from lit_opd.tracking import begin_run

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
TAGS = {"estimator", "family", "student", "teacher", "teacher_quantization", "seed", "dataset_sha256"}
YARDSTICKS = ("reverse_kl", "forward_kl", "jsd", "teacher_nll", "top1_agreement", "student_entropy", "teacher_entropy",
              "accuracy", "pass_at_2")  # fmt: skip
METRICS = {
    *(f"train/{name}" for name in ("loss", "reverse_kl", "entropy", "grad_norm")),
    *(f"rollout/{name}" for name in ("length", "truncated_frac", "eos_frac", "repetition_frac", "sampler_gap")),
    *(f"val/{name}" for name in YARDSTICKS),
    *(f"perf/{name}" for name in
      ("tokens_per_s", "rollout_s", "teacher_s", "student_s", "step_s", "peak_memory_mb")),
}  # fmt: skip


@pytest.fixture(scope="module")
def student_with_dropout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout") / "student"
    shutil.copytree(PACKAGE_FOLDER / "tiny" / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return f"student.path={folder}"


@pytest.fixture(scope="module")
def finished(make_workspace, student_with_dropout):
    """One uninterrupted run, which the resumed ones must equal."""
    made = make_workspace("finished", student_with_dropout)
    done = made.run(*made.arguments("fit"))
    assert done.returncode == 0, done.stderr
    return made, done


def read(workspace):
    state = torch.load(workspace.checkpoint, weights_only=True)
    return state, (workspace.output / "student" / "model.safetensors").read_bytes()


def same(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def assert_same_end(resumed, finished):
    (state, exported), (expected, expected_export) = read(resumed), read(finished)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "torch_rng_state"):
        assert same(state[key], expected[key]), key
    assert exported == expected_export


def losses(workspace):
    (run,) = workspace.runs
    return {m.step: m.value for m in workspace.client.get_metric_history(run.info.run_id, "train/loss")}


def test_fit_prints_what_a_user_needs(finished):
    workspace, done = finished
    lines = done.stdout.splitlines()
    for word in ("before", "after 8 steps", "teacher"):
        assert word in lines[2] + lines[1] + lines[0]
    for label in ("accuracy", "reverse KL", "forward KL", "JSD", "pass@2"):
        (row,) = [line for line in lines if line.strip().startswith(label)]
        assert row.count("[") == row.count("]") == 3
    (run,) = workspace.runs
    assert "checkpoint: run/checkpoints/last.ckpt" in lines
    assert "exported model: run/student" in lines
    assert f"mlflow ui --backend-store-uri {workspace.uri}" in done.stdout
    assert run.info.run_id in done.stdout
    assert max(map(len, lines[:14])) <= 80
    assert "Warning" not in done.stderr


def test_fit_leaves_a_summary_and_a_configuration_that_loads_back(finished):
    workspace, _ = finished
    summary = json.loads((workspace.output / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["after"]["reverse_kl"].keys() == {"mean", "low", "high"}
    words = workspace.arguments("fit")
    (run,) = workspace.runs
    artifact = workspace.client.download_artifacts(run.info.run_id, "config.yaml", str(workspace.folder))
    assert load_config([artifact]) == load_config([words[2]], words[3:])


def test_fit_leaves_the_final_results_of_every_prompt(finished):
    workspace, _ = finished
    (run,) = workspace.runs
    path = workspace.client.download_artifacts(run.info.run_id, "prompts.json", str(workspace.folder))
    table = json.loads(Path(path).read_text())
    assert table == json.loads((workspace.output / "prompts.json").read_text())
    after = json.loads((workspace.output / "summary.json").read_text())["after"]
    assert table["sums"].keys() == table["weights"].keys() == after.keys()
    assert len(set(table["prompts"])) == 6
    for name, interval in after.items():
        assert len(table["sums"][name]) == 6
        assert sum(table["sums"][name]) / sum(table["weights"][name]) == pytest.approx(interval["mean"], rel=1e-12)


def test_fit_exports_the_trained_student(finished):
    workspace, _ = finished
    exported = AutoModelForCausalLM.from_pretrained(workspace.output / "student")
    trained = AutoModelForCausalLM.from_pretrained(PACKAGE_FOLDER / "tiny" / "student")
    before = trained(torch.arange(3, 17)[None]).logits
    weights = torch.load(workspace.checkpoint, weights_only=True)["state_dict"]
    trained.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    expected = trained(torch.arange(3, 17)[None]).logits
    assert torch.equal(exported(torch.arange(3, 17)[None]).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_fit_records_the_run_in_mlflow(finished):
    workspace, _ = finished
    (run,) = workspace.runs
    assert run.info.status == "FINISHED"
    assert run.data.tags.keys() >= TAGS
    assert run.data.tags["family"] == "token"
    assert run.data.tags["teacher"].endswith("tiny/teacher")
    assert run.data.metrics.keys() >= METRICS
    assert run.data.params["optim.scheduler_kwargs.T_max"] == "8"
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert sorted(losses(workspace)) == list(range(1, 9))


def curve(workspace, name):
    (run,) = workspace.runs
    return {m.step: m.value for m in workspace.client.get_metric_history(run.info.run_id, name)}


def models(workspace):
    (run,) = workspace.runs
    return workspace.client.search_logged_models([run.info.experiment_id])


def test_fit_tells_mlflow_which_prompts_it_used(finished):
    workspace, _ = finished
    (run,) = workspace.runs
    found = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert found.keys() == {"training", "validation"}
    for part, rows in (("training", 24), ("validation", 6)):
        assert (found[part].name, found[part].source_type) == ("problems", "function")
        assert json.loads(found[part].source) == {"path": "lit_opd.data.arithmetic:problems"}
        profile = {"num_rows": rows, "prompts_used": rows, "dropped": 0, "truncated": 0}
        assert json.loads(found[part].profile) == profile
        columns = json.loads(found[part].schema)["mlflow_colspec"]
        assert columns == [{"name": name, "type": "string"} for name in ("prompt", "answer", "completion")]


def test_fit_counts_what_training_cost_along_with_every_evaluation(finished):
    workspace, _ = finished
    seconds, speed = curve(workspace, "perf/step_s"), curve(workspace, "perf/tokens_per_s")
    for step, spent in curve(workspace, "cost/seconds").items():
        assert spent == pytest.approx(sum(seconds[i] for i in range(1, step + 1)), abs=1e-3)
    tokens = curve(workspace, "cost/tokens")
    assert tokens == {
        step: pytest.approx(sum(seconds[i] * speed[i] for i in range(1, step + 1)), rel=1e-5) for step in (0, 3, 6, 8)
    }
    assert tokens[8] == int(tokens[8])
    (run,) = workspace.runs
    assert run.data.metrics["cost/median_step_s"] == pytest.approx(median(seconds.values()))
    assert run.data.metrics["cost/peak_memory_mb"] == max(curve(workspace, "perf/peak_memory_mb").values())


def test_what_training_cost_is_told_however_seldom_steps_are_logged(finished, make_workspace, student_with_dropout):
    workspace = make_workspace("seldom", student_with_dropout)
    done = workspace.run(*workspace.arguments("fit", "trainer.log_every_n_steps=7"))
    assert done.returncode == 0, done.stderr
    assert list(curve(workspace, "perf/step_s")) == [7]
    assert curve(workspace, "cost/tokens") == curve(finished[0], "cost/tokens")
    assert list(curve(workspace, "cost/seconds")) == [0, 3, 6, 8]


def test_several_updates_on_a_rollout_count_steps_everywhere_and_its_tokens_once(make_workspace, student_with_dropout):
    workspace = make_workspace("updates", student_with_dropout)
    steps = ("optim.updates_per_rollout=2", "trainer.log_every_n_steps=3", "diagnostics.every_n_steps=4")
    done = workspace.run(*workspace.arguments("fit", *steps))
    assert done.returncode == 0, done.stderr
    lengths = curve(workspace, "rollout/length")
    # At the first end of a batch, of two steps each, at which so many are full.
    assert list(lengths) == list(curve(workspace, "train/loss")) == [4, 6]
    assert list(curve(workspace, "lr-AdamW")) == [2, 4], "of the steps that follow"
    assert list(curve(workspace, "val/reverse_kl")) == [0, 4, 6, 8]
    assert list(curve(workspace, "advantage/mean")) == [4, 8]
    tokens = curve(workspace, "cost/tokens")
    assert tokens[6] - tokens[4] == pytest.approx(8 * lengths[6], rel=1e-6)


def test_fit_enters_the_student_among_mlflows_models_without_its_weights(finished):
    workspace, _ = finished
    (run,), (model,) = workspace.runs, models(workspace)
    assert (model.name, model.source_run_id, str(model.status)) == ("full_vocab seed 0", run.info.run_id, "READY")
    assert [(output.model_id, output.step) for output in run.outputs.model_outputs] == [(model.model_id, 8)]
    assert model.params["folder"] == run.data.tags["exported_student"] == str(workspace.output / "student")
    reached = {metric.key: metric for metric in model.metrics}
    for name in ("val/reverse_kl", "val/accuracy", "cost/tokens", "cost/seconds"):
        assert reached[name].value == run.data.metrics[name]
    digests = {entry.tags[0].value: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert reached["val/reverse_kl"].dataset_digest == digests["validation"]
    assert not workspace.client.list_logged_model_artifacts(model.model_id)


def test_fit_offers_a_view_of_its_experiment(finished):
    workspace, _ = finished
    view = json.loads(workspace.client.get_experiment_by_name("tests").tags["mlflow.sharedViewState.lit_opd"])
    (run,) = workspace.runs
    for column in json.loads(view["state"])["selectedColumns"]:
        kind, name = column.replace("`", "").split(".", 1)
        # Runs of a comparison are of a variant.
        assert kind == "attributes" or name in getattr(run.data, kind) or column == "tags.`variant`", column


def test_fit_records_completions_before_during_and_after(finished):
    workspace, _ = finished
    (run,) = workspace.runs
    path = workspace.client.download_artifacts(run.info.run_id, "completions.json", str(workspace.folder))
    table = json.loads(Path(path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {(row["policy"], row["step"]) for row in rows} == {
        ("before", 0), ("teacher", 0), ("student", 3), ("student", 6), ("student", 8),
    }  # fmt: skip
    for row in rows:
        tokens = json.loads(row["token_log_ratios"])
        assert row["reward"] in (0.0, 1.0)
        assert "".join(token for token, _ in tokens) == row["completion"]
        assert row["mean_log_ratio"] == pytest.approx(sum(ratio for _, ratio in tokens) / len(tokens))


def test_a_run_has_not_finished_when_lightning_has_but_its_results_are_not_written(workspace):
    config = load_config([QUICKSTART], [f"tracking.uri={workspace.uri}", "tracking.experiment=tests"])
    logger = begin_run(config, {"student": "s", "teacher": "t", "estimator": "token"})
    for status, recorded in (("success", "RUNNING"), ("failed", "FAILED")):
        logger.finalize(status)
        assert logger.experiment.get_run(logger.run_id).info.status == recorded


def resume(workspace, begun, whole):
    """Goes on with a stopped run, which ends as the one that was never stopped: its run in MLflow and what it said."""
    resumed = workspace.run(*workspace.arguments("fit", "--resume", "auto"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(workspace, whole)
    (run,) = workspace.runs
    assert (run.info.run_id, run.info.status) == (begun.info.run_id, "FINISHED")
    assert losses(workspace) == losses(whole)
    assert curve(workspace, "cost/tokens") == curve(whole, "cost/tokens")
    return run, resumed


def test_killed_run_resumes_bit_for_bit(finished, make_workspace, student_with_dropout):
    workspace = make_workspace("killed", student_with_dropout)
    killed = workspace.stop_after_first_checkpoint(signal.SIGKILL, *workspace.arguments("fit", "--resume", "auto"))
    assert killed.returncode == -signal.SIGKILL
    assert not (workspace.output / "student").exists()
    (begun,) = workspace.runs
    assert begun.info.status == "RUNNING"
    run, resumed = resume(workspace, begun, finished[0])
    assert len(run.inputs.dataset_inputs) == 2
    assert len(models(workspace)) == 1
    steps = {m.step for m in workspace.client.get_metric_history(run.info.run_id, "val/reverse_kl")}
    assert steps == {0, 3, 6, 8}
    assert resumed.stdout.splitlines()[3:6] == finished[1].stdout.splitlines()[3:6]  # with the results before training


def test_interrupted_run_saves_and_resumes_bit_for_bit(finished, make_workspace, student_with_dropout):
    workspace = make_workspace("interrupted", student_with_dropout)
    stopped = workspace.stop_after_first_checkpoint(signal.SIGINT, *workspace.arguments("fit"))
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert "--resume auto" in stopped.stderr
    (begun,) = workspace.runs
    assert begun.info.status == "KILLED"
    saved = torch.load(workspace.checkpoint, weights_only=True)["global_step"]
    assert 3 <= saved < 8
    assert sorted(losses(workspace)) == list(range(1, saved + 1))
    resume(workspace, begun, finished[0])
    once_more = workspace.run(*workspace.arguments("fit", "--resume", "auto"))
    assert once_more.returncode == 0, once_more.stderr
    assert len(models(workspace)) == 1, "there was nothing left to do"


NOT_FINITE = """
from lit_opd.types import Estimate

def fails_late(tokens):
    if tokens.progress == 2 / 8:
        {failure}
    log_ratio = (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()
    return Estimate(loss_BT=log_ratio * tokens.student_logps_BT, kl_BT=log_ratio)
"""


def test_run_that_is_not_finite_ends_in_one_line_with_a_checkpoint(workspace):
    loss = "return Estimate(loss_BT=tokens.student_logps_BT * float('nan'), kl_BT=tokens.student_logps_BT.detach())"
    (workspace.folder / "mine.py").write_text(NOT_FINITE.format(failure=loss))
    done = workspace.run(*workspace.arguments("fit", "estimator.name=mine.py:fails_late"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert "optimizer step 2" in line
    assert "optim.lr" in line
    (run,) = workspace.runs
    assert run.info.status == "FAILED"
    assert torch.load(workspace.checkpoint, weights_only=True)["global_step"] == 2


def test_run_that_raises_is_a_failed_run(workspace, capsys):
    from lit_opd.cli import main

    (workspace.folder / "mine.py").write_text(NOT_FINITE.format(failure="raise RuntimeError('a bug of mine')"))
    assert main(workspace.arguments("fit", "estimator.name=mine.py:fails_late")) == 1
    assert "RuntimeError: a bug of mine" in capsys.readouterr().err.splitlines()[-1]
    (run,) = workspace.runs
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_two_processes_are_one_run(make_workspace):
    workspace = make_workspace("two")
    done = workspace.run(*workspace.arguments("fit", "trainer.devices=2", "trainer.strategy=ddp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 8 steps") == 1
    (run,) = workspace.runs
    assert run.info.status == "FINISHED"
    assert sorted(losses(workspace)) == list(range(1, 9))
    assert json.loads((workspace.output / "summary.json").read_text())["steps"] == 8
