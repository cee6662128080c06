"""The yardsticks against dense references."""

import math

import pytest
import torch

from lit_opd.models import LanguageModel, measure_yardsticks
from lit_opd.teachers import LocalScorer, Wanted
from lit_opd.types import SamplingLaw


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12)


def measure(policy, teacher, rollout, rows, size=16):
    """Yardsticks as an evaluation takes them: the teacher at temperature 1."""
    scores = LocalScorer(teacher, rows).untempered().score(rollout, Wanted(full=True))
    return measure_yardsticks(policy, scores, rollout, rows, size)


def dense_yardsticks(p, q, ids):
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    taken_p, taken_q = (x.gather(-1, ids[:, None])[:, 0] for x in (p, q))
    return {
        "reverse_kl": (p.exp() * (p - q)).sum(-1),
        "forward_kl": (q.exp() * (q - p)).sum(-1),
        "jsd": 0.5 * (p.exp() * (p - m)).sum(-1) + 0.5 * (q.exp() * (q - m)).sum(-1),
        "teacher_nll": -taken_q,
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "student_entropy": -(p.exp() * p).sum(-1),
        "teacher_entropy": -(q.exp() * q).sum(-1),
        "log_ratio": taken_p - taken_q,
    }


def dense_supports(p, q, size, stop_ids):
    """A position after the other, in plain Python."""
    found = {name: [] for name in ("overlap", "student_mass", "teacher_mass", "stop_log_ratio", "entropy_gap")}
    for own, other in zip(p.exp().tolist(), q.exp().tolist(), strict=True):
        top, others = (sorted(range(len(x)), key=x.__getitem__, reverse=True)[:size] for x in (own, other))
        found["overlap"].append(len(set(top) & set(others)) / len(top))
        found["student_mass"].append(sum(own[i] for i in others))
        found["teacher_mass"].append(sum(other[i] for i in others))
        found["stop_log_ratio"].append(math.log(sum(own[i] for i in stop_ids) / sum(other[i] for i in stop_ids)))
        found["entropy_gap"].append(sum(y * math.log(y) - x * math.log(x) for x, y in zip(own, other, strict=True)))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 1), (1000, 16), (1000, 100)])
def test_yardsticks_are_the_dense_ones(rows, size, two_models, monkeypatch):
    student, teacher, rollout, p, q = two_models
    monkeypatch.setattr(student.config, "eos_token_id", [2, 9])
    found = measure(student, teacher, rollout, rows, size)
    expected = dense_yardsticks(p, q, rollout.ids_BT[rollout.mask_BT]) | dense_supports(p, q, size, [2, 9])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name][rollout.mask_BT].double(), values, rtol=1e-6, atol=1e-6)
        assert not found[name][~rollout.mask_BT].any()


def test_where_no_token_stops_there_is_nothing_to_say_of_stopping(two_models, monkeypatch):
    student, teacher, rollout, _, _ = two_models
    monkeypatch.setattr(LanguageModel, "stop_ids", [])
    found = measure(student, teacher, rollout, 3)
    assert found["stop_log_ratio"][rollout.mask_BT].isnan().all()
    assert all(values.isfinite().all() for name, values in found.items() if name != "stop_log_ratio")


def test_yardsticks_know_no_temperature(two_models, tiny_tokenizer):
    """Neither as the teacher nor as the policy that is measured."""
    student, teacher, rollout, _, _ = two_models
    warm = LanguageModel(teacher.model, tiny_tokenizer, "teacher", own_precision=True, temperature=0.3)
    for policies, warm_policies in [((student, teacher), (student, warm)), ((teacher, teacher), (warm, warm))]:
        expected, found = (measure(*p, rollout, 4) for p in (policies, warm_policies))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_teacher_does_not_differ_from_itself_under_autocast(make_model, tiny_tokenizer, make_batch, sample):
    """Its body and both uses of its head run in its own precision."""
    teacher = LanguageModel(make_model(2), tiny_tokenizer, "teacher", own_precision=True)
    rollout = sample(teacher.model, make_batch(), SamplingLaw())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(teacher, teacher, rollout, 4)
    assert found["reverse_kl"].abs().max() < 1e-6
    assert not found["log_ratio"].any()
    assert (found["top1_agreement"][rollout.mask_BT] == 1).all()


def test_measuring_uses_eval_mode_and_restores_the_mode(make_model, tiny_tokenizer, make_batch, sample):
    student = LanguageModel(make_model(1, attention_dropout=0.5).train(), tiny_tokenizer, "student")
    teacher = LanguageModel(make_model(2, attention_dropout=0.5).train(), tiny_tokenizer, "teacher")
    rollout = sample(student.model, make_batch(), SamplingLaw())
    one, two = (measure(student, teacher, rollout, 100) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert student.model.training


def test_a_teacher_that_scores_tokens_only_is_measured_as_far_as_that_goes(two_models):
    student, teacher, rollout, _, _ = two_models
    whole = measure(student, teacher, rollout, 3)
    found = measure_yardsticks(student, LocalScorer(teacher, 3).score(rollout, Wanted()), rollout, 3)
    assert found.keys() == {"teacher_nll", "log_ratio", "student_entropy"}
    for name, values in found.items():
        torch.testing.assert_close(values, whole[name], rtol=0, atol=1e-6)
