"""A teacher that is on the accelerator only while it scores or samples."""

import copy
from contextlib import nullcontext

import pytest
import torch

from lit_opd import DistillationModule
from lit_opd.config import TeacherConfig
from lit_opd.lab.audit.readings import compare_positions
from lit_opd.models import LanguageModel, measure_yardsticks
from lit_opd.teachers import LocalScorer, Wanted
from lit_opd.types import SamplingLaw

SMALL = {"rollout": {"max_new_tokens": 6, "student_share": 0.5}, "optim": {"micro_batch_tokens": 30, "lr": 0.1}}


@pytest.fixture
def teacher_path(make_model, save_model):
    return save_model(make_model(2))


@pytest.mark.parametrize("estimator", ["full_vocab", "token"])
def test_it_teaches_the_same(estimator, make_model, teacher_path, tiny_tokenizer, fit):
    def weights(offload):
        teacher = TeacherConfig(teacher_path, "float32", offload=offload)
        module = DistillationModule(make_model(1), teacher, estimator, tokenizer=tiny_tokenizer, **copy.deepcopy(SMALL))
        fit(module, 2)
        return dict(module.model.state_dict())

    here, away = weights(False), weights(True)
    assert all(torch.equal(here[name], away[name]) for name in here)


def test_it_comes_to_score_and_goes_before_the_student_runs(make_model, teacher_path, tiny_tokenizer, fit, monkeypatch):
    teacher = TeacherConfig(teacher_path, "float32", offload=True)
    module = DistillationModule(make_model(1), teacher, "full_vocab", tokenizer=tiny_tokenizer,
                                optim={"micro_batch_tokens": 30})  # fmt: skip
    events = []
    park, evaluating, step = LanguageModel._park, LanguageModel.evaluating, module.step
    monkeypatch.setattr(LanguageModel, "_park", lambda self: (events.append("goes"), park(self))[1])
    inner = module.estimate
    module.estimate = lambda update: (events.append(f"estimate, {len(update) > 1}"), inner(update))[1]
    module.step = lambda *arguments: (events.append("step"), step(*arguments))[1]
    fit(module, 2, limit_val_batches=0)
    assert evaluating is LanguageModel.evaluating
    # Once when it is loaded; then once for all micro-batches of a step.
    assert events == ["goes", *["goes", "estimate, True", "step"] * 2]


def test_while_it_is_away_its_arithmetic_is_that_of_where_its_head_is(make_model, tiny_tokenizer, monkeypatch):
    model = LanguageModel(make_model(2), tiny_tokenizer, "reference", offload=True).freeze()
    model._place.head = (torch.empty(1, 1, device="meta"), None)
    asked = []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: bool(asked.append(device)))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: asked.append(device))
    monkeypatch.setattr(torch, "autocast", lambda device, **_: nullcontext(asked.append(device)))
    with model.precision():
        assert asked == ["meta"] * 3


def test_while_it_is_away_only_the_output_layer_stays(make_model, tiny_tokenizer):
    model = LanguageModel(make_model(2), tiny_tokenizer, "teacher", offload=True).freeze()
    whole, moves = model.head.weight_VH.clone(), []
    model.model.to = lambda device: moves.append(str(device))
    model.to(torch.device("cpu"))
    assert moves == ["cpu"]
    with model.evaluating():
        assert model._place.head is None
        with model.evaluating():  # inside, it is there already
            assert moves == ["cpu", "cpu"]
    assert moves == ["cpu", "cpu", "cpu"]
    assert model._place.head is not None
    assert torch.equal(model.untempered().head.weight_VH, whole)


def teacher_scores(student, teacher, rollout):
    return LocalScorer(teacher, 4).score(rollout, Wanted(support=3)).support_logps_NK


def yardsticks(student, teacher, rollout):
    scores = LocalScorer(teacher, 4).untempered().score(rollout, Wanted(full=True))
    return torch.stack(list(measure_yardsticks(student, scores, rollout, 4).values()))


def both_at_positions(student, teacher, rollout):
    return compare_positions(student, teacher, rollout, 4, lambda own, other, part: {"gap": own - other})["gap"]


@pytest.mark.parametrize("measure", [teacher_scores, yardsticks, both_at_positions])
def test_whoever_measures_it_uses_no_weight_that_is_away(measure, make_model, tiny_tokenizer, make_batch, sample):
    """Away, its weights are NaN here, where on an accelerator they would be on another device."""
    models = make_model(1), make_model(2)
    rollout = sample(models[0], make_batch(), SamplingLaw())
    student, near = (LanguageModel(m, tiny_tokenizer, "student", own_precision=True) for m in models)
    expected = measure(student, near, rollout)
    teacher = LanguageModel(copy.deepcopy(models[1]), tiny_tokenizer, "teacher", own_precision=True, offload=True)
    teacher.freeze()
    weights = [p.data for p in teacher.model.parameters()]

    def move(device):
        comes = teacher._place.head is None
        for parameter, data in zip(teacher.model.parameters(), weights, strict=True):
            parameter.data = data if comes else torch.full_like(data, torch.nan)

    teacher.model.to = move
    teacher.to(torch.device("cpu"))
    assert all(p.isnan().all() for p in teacher.model.parameters())
    assert torch.equal(measure(student, teacher, rollout), expected)
    assert all(p.isnan().all() for p in teacher.model.parameters())
