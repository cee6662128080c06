"""The best checkpoint by a yardstick is kept, and exported of a run that was stopped for collapse."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.callbacks import WatchCollapse
from lit_opd.cli import main
from lit_opd.config import CollapseConfig, load_config
from lit_opd.errors import LintWarning, UserError
from lit_opd.runs.best import check_measured, go_back, note_last
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.lightning_trainer import build_trainer

SHORT = ("trainer.max_steps=9", "evaluation.every_n_steps=2", "evaluation.teacher=false", "data.validation_size=4",
         "tracking.system_metrics=false", "diagnostics.every_n_steps=0", "rollout.max_new_tokens=4")  # fmt: skip
WORSE = ("optim.lr=0.3", "optim.warmup_steps=0", "optim.scheduler=null", "callbacks=[mine.py:Collapse]")
MINE = """
import lightning
from lit_opd.callbacks import WatchCollapse

class Collapse(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            (watch,) = (c for c in trainer.callbacks if isinstance(c, WatchCollapse))
            watch.stopped = trainer.should_stop = True
"""


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_collapsed_run_exports_its_best_and_says_so(workspace, capsys):
    (workspace.folder / "mine.py").write_text(MINE)
    assert main(workspace.arguments("fit", *SHORT, *WORSE, "checkpoint.keep_best=reverse_kl")) == 0
    out = capsys.readouterr().out
    summary = json.loads((workspace.output / "summary.json").read_text())
    (record,) = workspace.runs
    history = workspace.client.get_metric_history(record.info.run_id, "val/reverse_kl")
    values = {point.step: point.value for point in history if point.step}
    assert sorted(values) == [2, 4, 5]
    best = min(values, key=values.get)
    assert best != 5
    assert (summary["steps"], summary["exported_step"]) == (5, best)
    assert summary["after"]["reverse_kl"]["mean"] == pytest.approx(values[best])
    assert f"after {best} steps" in out
    assert f"stopped for collapse at step 5: measured and exported is the best by reverse_kl, of step {best}\n" in out
    assert "checkpoint: run/checkpoints/best.ckpt" in out
    assert record.data.tags["exported"] == f"step {best}, the best by reverse_kl"
    kept = torch.load(workspace.output / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["global_step"] == best
    exported = weights(workspace.output / "student")
    assert all(torch.equal(exported[name.removeprefix("model.")], v) for name, v in kept["state_dict"].items())
    rows = [json.loads(line) for line in (workspace.output / "completions.jsonl").read_text().splitlines()]
    assert sum(row["reward"] for row in rows) / len(rows) == pytest.approx(summary["after"]["accuracy"]["mean"])
    assert main(workspace.arguments("fit", *SHORT, *WORSE, "checkpoint.keep_best=reverse_kl", "--resume", "auto")) == 0
    again = capsys.readouterr().out
    assert again.partition("tokens\n")[2].partition("MLflow")[0] == out.partition("tokens\n")[2].partition("MLflow")[0]


def test_without_a_yardstick_the_last_is_exported_and_the_key_is_named(workspace):
    watch = WatchCollapse(CollapseConfig())
    trainer = SimpleNamespace(callbacks=[watch], global_step=5)
    nothing = load_config([workspace.config]), RunFolder(workspace.output), trainer, None, None
    assert go_back(*nothing) is None
    watch.stopped = True
    with pytest.warns(LintWarning, match=r"the student of step 5 is exported as it is\. Set checkpoint\.keep_best="):
        assert go_back(*nothing) is None


def test_the_last_evaluation_counts_though_it_comes_after_training(workspace, monkeypatch):
    words = ("checkpoint.keep_best=accuracy", *SHORT)
    config = load_config([workspace.config], words)
    trainer = build_trainer(config, RunFolder(workspace.output))
    assert [c.monitor for c in trainer.checkpoint_callbacks] == ["val/accuracy", None]  # the last knows the best
    (best, _) = trainer.checkpoint_callbacks
    best.best_k_models, best.kth_best_model_path, best.kth_value = {"best.ckpt": torch.tensor(0.5)}, "best.ckpt", 0.5
    saved = []
    monkeypatch.setattr(trainer, "save_checkpoint", saved.append)
    for accuracy in (0.4, 0.6):
        module = SimpleNamespace(results={"val": {"accuracy": SimpleNamespace(mean=accuracy)}})
        note_last(config, RunFolder(workspace.output), trainer, module)
        assert saved == [workspace.output / "checkpoints" / "best.ckpt"] * (accuracy > 0.5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["checkpoint.keep_best=reverse_k"], r"found 'reverse_k'\. Did you mean 'reverse_kl'\?"),
        (["checkpoint.keep_best=length"], "of which less or more is better, found 'length'"),
        (["checkpoint.keep_best=accuracy", "data.verifier=null"], r"found 'accuracy' without data\.verifier"),
        (["checkpoint.keep_best=pass_at_3"], "found 'pass_at_3'"),
    ],
)
def test_only_what_is_measured_and_has_a_good_direction_is_taken(workspace, words, told):
    with pytest.raises(UserError, match=rf"checkpoint\.keep_best: .*{told}"):
        build_trainer(load_config([workspace.config], words), RunFolder(workspace.output))


def test_a_teacher_that_scores_tokens_alone_gives_no_divergence(workspace):
    scorer = SimpleNamespace(gives=frozenset({"token"}))
    for name in ("reverse_kl", "teacher_nll", "accuracy"):
        config = load_config([workspace.config], [f"checkpoint.keep_best={name}"])
        if name == "reverse_kl":
            with pytest.raises(UserError, match=r"no whole distributions, found 'reverse_kl'"):
                check_measured(config, scorer)
        else:
            check_measured(config, scorer)
