import copy
from dataclasses import replace

import pytest
import torch

from lit_opd.errors import UserError
from lit_opd.lab.audit import quantization
from lit_opd.lab.audit.quantization import quantised_teacher
from lit_opd.models import LanguageModel


@pytest.fixture
def against(make_evidence, models, tiny_tokenizer, monkeypatch):
    """Audits a teacher quantised by a disturbance of that size, against the one without."""

    def run(disturbance, estimator="full_vocab", quantization_asked="8bit"):
        torch.manual_seed(3)
        rough = copy.deepcopy(models[1])
        with torch.no_grad():
            rough.lm_head.weight += disturbance * torch.randn_like(rough.lm_head.weight)
        loaded, other = (rough, models[1]) if quantization_asked == "none" else (models[1], rough)
        full = LanguageModel(copy.deepcopy(loaded), tiny_tokenizer, "teacher", own_precision=True).freeze()
        asked = []
        monkeypatch.setattr(quantization, "load_frozen", lambda config, _: asked.append(config.quantization) or full)
        evidence = make_evidence(teacher=other, estimator=estimator)
        config = replace(evidence.config, teacher=replace(evidence.config.teacher, quantization=quantization_asked))
        found = quantised_teacher(replace(evidence, config=config))
        assert asked == ["8bit" if quantization_asked == "none" else "none"]
        return found

    return run


@pytest.mark.parametrize(("disturbance", "verdict"), [(1e-3, "pass"), (0.06, "warn"), (0.5, "fail")])
def test_the_cosine_of_the_gradients_decides(against, disturbance, verdict):
    found = against(disturbance)
    assert found.verdict == verdict
    assert (found.fix == "") == (verdict == "pass")
    if verdict == "pass":
        assert found.numbers["cosine"] > 0.99
        assert found.found.startswith("8bit: log-prob error 0.0")
    else:
        assert found.fix.startswith("Set teacher.quantization=none")


def test_a_teacher_without_error_has_none(against):
    numbers = against(0.0).numbers
    assert numbers["logp_error"] == 0
    assert numbers["jaccard"] == 1
    assert numbers["cosine"] == pytest.approx(1)
    assert numbers["k"] == 8


def test_the_error_and_the_first_choices_are_those_of_plain_forward_passes(against, make_evidence, models, full_logits):
    found = against(0.06).numbers
    torch.manual_seed(3)
    rough = copy.deepcopy(models[1])
    with torch.no_grad():
        rough.lm_head.weight += 0.06 * torch.randn_like(rough.lm_head.weight)
    rollout = make_evidence().rollout
    full, other = (full_logits(model, rollout).log_softmax(-1)[rollout.mask_BT] for model in (models[1], rough))
    ids = rollout.ids_BT[rollout.mask_BT][:, None]
    assert found["logp_error"] == pytest.approx((full - other).gather(-1, ids).abs().mean().item(), rel=1e-3)
    sets = [[set(row) for row in logps.topk(8).indices.tolist()] for logps in (full, other)]
    jaccard = sum(len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)) / len(sets[0])
    assert found["jaccard"] == pytest.approx(jaccard, rel=1e-5)


def test_without_being_asked_for_it_is_information(against):
    found = against(0.5, quantization_asked="none")
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found.startswith("not asked for; 8bit: log-prob error ")


def test_what_is_not_measured_says_why(make_evidence, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "_SMALL", 0)
        found = quantised_teacher(make_evidence())
    assert (found.verdict, found.found) == ("pass", "not measured: teacher.quantization=none, and 0 M weights")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = quantised_teacher(make_evidence())
    assert found.found == "not measured: bitsandbytes is not installed, and teacher.quantization=none"


@pytest.mark.parametrize(("asked", "verdict"), [("none", "pass"), ("8bit", "warn")])
def test_a_teacher_that_cannot_be_loaded_again_is_told(make_evidence, monkeypatch, asked, verdict):
    def refuse(config, tokenizer):
        raise UserError("teacher.path", "readable weights", "none", "Correct it.")

    monkeypatch.setattr(quantization, "load_frozen", refuse)
    evidence = make_evidence()
    config = replace(evidence.config, teacher=replace(evidence.config.teacher, quantization=asked))
    found = quantised_teacher(replace(evidence, config=config))
    assert found.verdict == verdict
    assert found.found == "not measured: teacher.path: expected readable weights, found none. Correct it."
    assert (found.fix == "") == (verdict == "pass")
