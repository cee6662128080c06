"""What users add: each thing is one definition in a file of theirs, which one key of the configuration names."""

import json
import math
import sys
from pathlib import Path

import pytest

from lit_opd.cli import main

MINE = '''
import math

import lightning as L
import torch

from lit_opd.rollout import LocalEngine
from lit_opd.teachers import Scorer
from lit_opd.types import Estimate, Scores

USED = []


def estimator(tokens):
    USED.append("estimator")
    ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
    return Estimate(ratio * tokens.student_logps_BT, ratio)


class Uniform(Scorer):
    """A teacher that finds every token as probable as any other."""

    name, gives = "teacher", frozenset({"token"})

    def __init__(self, section, tokenizer):
        self.size = len(tokenizer)

    def score(self, rollout, wanted):
        USED.append("scorer")
        return Scores(logps_N=torch.full((int(rollout.mask_BT.sum()),), -math.log(self.size)))


class Engine(LocalEngine):
    def __init__(self, section):
        super().__init__()

    def sample(self, *arguments):
        USED.append("engine")
        return super().sample(*arguments)


def source(**keywords):
    USED.append("source")
    return [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(9)] * 4


class Callback(L.Callback):
    def on_train_batch_end(self, *_):
        USED.append("callback")
'''
YARDSTICK = """
from lit_opd.measures import register_measure


@register_measure("total_variation", unit="probability", better="lower")
def total_variation(student_logps_cV, teacher_logps_cV, ids_c):
    USED.append("yardstick")
    return (student_logps_cV.exp() - teacher_logps_cV.exp()).abs().sum(-1) / 2
"""
SHORT = (
    "trainer.max_steps=2",
    "evaluation.every_n_steps=2",
    "diagnostics.figures=false",
    "tracking.system_metrics=false",
)


@pytest.fixture
def fit(workspace):
    (workspace.folder / "mine.py").write_text(MINE)

    def run(*words):
        code = main([*workspace.arguments("fit"), *SHORT, *words])
        return code, workspace

    return run


def test_one_file_of_a_user_is_enough_for_each(fit):
    keys = {"estimator": "estimator.name=mine.py:estimator", "engine": "rollout.engine=mine.py:Engine",
            "source": "data.source=function data.path=mine.py:source data.verifier=null",
            "yardstick": "evaluation.measures=[mine.py:total_variation]",
            "callback": "callbacks=[mine.py:Callback]"}  # fmt: skip
    with Path("mine.py").open("a") as file:  # registered once in this process
        file.write(YARDSTICK)
    code, workspace = fit(*" ".join(keys.values()).split())
    assert code == 0
    (mine,) = (module for name, module in sys.modules.items() if name.startswith("lit_opd_plugin_mine_")
               and getattr(module, "__file__", "").startswith(str(workspace.folder)))  # fmt: skip
    assert set(mine.USED) == keys.keys()
    after = json.loads((workspace.output / "summary.json").read_text())["after"]
    assert 0 < after["total_variation"]["mean"] < 1
    assert any("val/total_variation" in run.data.metrics for run in workspace.runs)


def test_a_scorer_of_a_user_teaches_and_is_measured_as_far_as_it_goes(fit, capsys):
    code, workspace = fit("teacher.kind=mine.py:Uniform", "estimator.name=token")
    assert code == 0
    told = capsys.readouterr().err
    assert "evaluation.teacher: left out" in told
    assert "val/* has no reverse_kl, forward_kl, jsd, top1_agreement, teacher_entropy" in told
    summary = json.loads((workspace.output / "summary.json").read_text())
    assert not summary["teacher"]
    assert "reverse_kl" not in summary["after"]
    assert summary["after"]["teacher_nll"]["mean"] == pytest.approx(math.log(17), abs=1e-5)
    assert workspace.runs[0].data.tags["teacher"] == "mine.py:Uniform"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["estimator.name=teacher_topk"], "estimator.name: expected one that asks this teacher for no more than token, "
                                          "found 'teacher_topk', which needs support. Set estimator.name=token."),
        (["estimator.name=full_vocab"], "found 'full_vocab', which needs full. Set estimator.name=token."),
        (["estimator.name=token", "rollout.student_share=0.5"], "rollout.demonstrations: expected data: this teacher "
                                                                "scores, and cannot sample"),
        (["estimator.name=token", "rollout.student_from=5"], "Set it, or let the student write everything."),
        (["estimator.name=token", "teacher.kind=mine.py:source"], "teacher.kind: expected"),
    ],
)  # fmt: skip
def test_what_a_scorer_cannot_give_is_refused_before_weights_load(fit, words, message, capsys):
    code, workspace = fit("teacher.kind=mine.py:Uniform", *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert message in error
    assert not workspace.output.exists()


@pytest.mark.parametrize("command", ["measure", "audit"])
def test_experiments_that_read_whole_distributions_refuse_it(fit, workspace, command, capsys):
    assert main([*workspace.arguments(command), "teacher.kind=mine.py:Uniform", "estimator.name=token"]) == 2
    assert f"teacher.kind: expected local for {command}" in capsys.readouterr().err
