"""A run proves its fast paths before the first step, records them, and comes back to the plain ones where one fails."""

import copy
import logging

import pytest
import torch
from shared_fixtures import PROMPTS

from lit_opd import DistillationModule
from lit_opd.distiller import Distiller
from lit_opd.errors import UserError
from lit_opd.fast_paths import Verdict
from lit_opd.models import proofs
from lit_opd.models.flash import attend_flash
from lit_opd.models.packed_attention import attend
from lit_opd.proving import ProvenModule
from lit_opd.rollout import LocalEngine
from lit_opd.teachers import LocalScorer

ROUNDING = "0.1 ms against 1 ms, off by 0"


@pytest.fixture
def asked(monkeypatch):
    """As on an accelerator, where every path is taken: what the parts are asked to prove."""
    asked = []

    def sampling(self, policy, rows, width, choice):
        asked.append(("sampling", policy.key, rows, width, choice))
        return [Verdict("captured decoding", True, ROUNDING)]

    def attention(model, rows, choice):
        asked.append(("attention", model.key, max(map(len, rows)), choice))
        return Verdict("flash attention", True, ROUNDING)

    def layers(model, tokens, choice):
        return Verdict("fused layers", False, "2 ms against 1 ms, off by 0")

    monkeypatch.setattr(ProvenModule, "_is_plain", False)
    monkeypatch.setattr(LocalEngine, "prove", sampling)
    monkeypatch.setattr(proofs, "prove_attention", attention)
    monkeypatch.setattr(proofs, "prove_parts", layers)
    return asked


@pytest.fixture
def student(make_model):
    return make_model(1)


@pytest.fixture
def teacher(make_model):
    return make_model(2, hidden_size=24)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def test_a_run_proves_once_on_its_own_shapes_and_says_what_is_left(asked, make_module, fit, student, teacher, caplog):
    caplog.set_level(logging.INFO, "lit_opd")
    module = make_module(copy.deepcopy(student), teacher, rollout={"num_completions": 3, "max_new_tokens": 5})
    record = fit(module, steps=2)
    longest = max(map(len, PROMPTS))
    assert asked[0][:2] == ("sampling", "student")
    assert asked[0][3] == longest + 5
    assert [entry[:2] for entry in asked[1:]] == [("attention", "student"), ("attention", "teacher")]
    assert asked[1][2] == longest + 5
    taken = ["captured decoding", "flash attention of the student", "flash attention of the teacher"]
    assert module.taken == taken
    assert "fused layers of the student: the plain path (2 ms against 1 ms" in caplog.text
    assert not module.verdicts["fused head"].taken  # whose own proof says that this is a CPU
    assert record.metrics[-1]["perf/paths"] == len(taken)


@pytest.mark.parametrize("where", ["score", "estimate"])
def test_a_path_that_fails_later_is_left_and_the_step_is_made_again(
    where, asked, make_module, fit, student, teacher, monkeypatch, caplog
):
    expected = make_module(copy.deepcopy(student), teacher)
    fit(expected, steps=2)
    module = make_module(copy.deepcopy(student), teacher)

    def fails(*args, **keywords):
        raise RuntimeError("CUDA error: misaligned address\nmore")

    def break_attention(self, batch, batch_idx):
        self.prove_models(batch)
        model = self.student if where == "estimate" else self.distiller.scorers["teacher"].model
        if self.global_step == 1 and self.taken:
            model.forward.attend = fails

    monkeypatch.setattr(ProvenModule, "on_train_batch_start", break_attention)
    fit(module, steps=2)
    assert torch.equal(weights(module), weights(expected))
    assert module.taken == ["captured decoding"]
    assert module.student.forward.attend is attend
    told = (
        "RuntimeError: CUDA error: misaligned address. Goes on without flash attention of the student, flash attention"
    )
    assert told in caplog.text


def test_paths_that_were_asked_for_have_no_way_back(asked, make_module, fit, student, teacher, monkeypatch):
    def fails(*args, **keywords):
        raise RuntimeError("no kernel image")

    module = make_module(copy.deepcopy(student), teacher, optim={"paths": "fast"})
    monkeypatch.setattr(module, "estimate", fails)
    monkeypatch.setattr(module, "prove_head", lambda updates: None)
    with pytest.raises(RuntimeError, match="no kernel image"):
        fit(module, steps=1)


def test_on_a_cpu_nothing_is_tried_unless_it_was_asked_for(make_module, fit, student, teacher, caplog):
    module = make_module(copy.deepcopy(student), teacher)
    record = fit(module, steps=1)
    assert module.verdicts == {}
    assert record.metrics[-1]["perf/paths"] == 0
    assert "path" not in caplog.text
    module = make_module(copy.deepcopy(student), teacher, optim={"paths": "fast"})
    with pytest.raises(UserError, match="optim.paths: expected captured decoding.*no CUDA graphs on cpu"):
        fit(module, steps=1)


def test_teachers_that_are_lent_by_turns_prove_themselves_once_and_come_back_fast(
    asked, make_model, save_model, student_path, make_trainer, make_data, monkeypatch
):
    """Each is read again when it is lent again, as another object, which has proven nothing."""
    found = []
    sections = {name: {"path": save_model(make_model(seed))} for seed, name in enumerate("ab", start=2)}
    module = DistillationModule(student_path, None, "token", teachers=sections, rollout={"max_new_tokens": 4})
    rows = [{"prompt": prompt, "teacher": name} for prompt, name in zip(PROMPTS, "abaab", strict=True)]
    score = LocalScorer.score_each

    def watched(scorer, rollouts, wanted):
        found.append((scorer.model.key, scorer.model.forward.attend is attend))
        scorer.model.forward.attend = attend  # flash attention does not run on a CPU
        return score(scorer, rollouts, wanted)

    stand_in = proofs.prove_attention

    def taking(model, *rest):
        verdict = stand_in(model, *rest)
        if model.key.startswith("teachers."):
            model.forward.attend = attend_flash  # as the proof leaves it
        return verdict

    monkeypatch.setattr(proofs, "prove_attention", taking)
    monkeypatch.setattr(LocalScorer, "score_each", watched)
    make_trainer(1).validate(module, make_data(rows, teacher_column="teacher"), verbose=False)
    found.clear()  # what follows is another loop of Lightning, for which the parts of a step are made anew
    make_trainer(3).fit(module, make_data(rows, teacher_column="teacher"))
    lent = [entry[:2] for entry in asked if entry[1].startswith("teachers.")]
    assert sorted(lent) == [("attention", "teachers.a"), ("attention", "teachers.b")]
    assert [key for key, _ in found].count("teachers.a") == 3
    assert not any(plain for _, plain in found)
    assert "flash attention of the teachers.b" in module.taken


@pytest.mark.usefixtures("interpreted")
def test_a_fused_head_stays_when_the_parts_of_a_step_are_made_anew(
    asked, make_module, fit, student, teacher, monkeypatch
):
    proofs_made = []

    def prove_head(self, micro, choice):
        proofs_made.append(choice)
        return Verdict("fused head", True, ROUNDING)

    monkeypatch.setattr(Distiller, "prove_head", prove_head)
    module = make_module(copy.deepcopy(student), teacher)
    for _ in range(2):
        fit(module)
        assert module.distiller.fused_head
    assert proofs_made == ["auto"]
