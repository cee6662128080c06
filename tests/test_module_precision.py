"""The dtype of every part of a step, and that autocast keeps no stale copies of weights."""

import copy
from collections import defaultdict

import pytest
import torch

from lit_opd import estimators
from lit_opd.functional import head as head_module
from lit_opd.models import forward
from lit_opd.rollout import local
from lit_opd.types import Estimate

FP32, BF16 = torch.float32, torch.bfloat16


def spy_on_bodies(student, teacher, seen):
    """Record the dtype of every body's projections: of the student with and without gradient, and of the teacher."""

    def hook(who, output):
        phase = who if who == "teacher" else "train" if torch.is_grad_enabled() else "sample"
        seen[phase].add(output.dtype)

    for who, model in (("student", student), ("teacher", teacher)):
        for part in model.model.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(lambda _, __, output, who=who: hook(who, output))


def spy_on_heads(student, teacher, seen, monkeypatch):
    """The same for the two heads, told apart by their width."""

    def linear(hidden, weight, bias=None):
        seen["student head" if weight.shape[1] == student.config.hidden_size else "teacher head"].add(hidden.dtype)
        return torch.nn.functional.linear(hidden, weight, bias)

    monkeypatch.setattr(head_module, "linear", linear)


def spying_estimator(name, seen):
    inner = estimators.build(name)

    def estimator(tokens):
        values = vars(tokens).values()
        seen["estimator"] |= {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
        estimate = inner(tokens)
        return Estimate(estimate.loss_BT, estimate.kl_BT)

    spec = estimators.get(name)
    estimators.register_estimator(f"spy_{name}", family=spec.family, needs=spec.needs)(estimator)
    return f"spy_{name}"


@pytest.mark.parametrize("name", ["token", "sequence", "full_vocab"])
@pytest.mark.parametrize(
    ("precision", "teacher_dtype", "student_dtype", "weight_dtype"),
    [
        ("32-true", FP32, FP32, FP32),
        ("32-true", BF16, FP32, FP32),
        ("bf16-mixed", FP32, BF16, FP32),
        ("bf16-mixed", BF16, BF16, FP32),
        ("bf16-true", FP32, BF16, BF16),
    ],
)
def test_compute_dtypes(
    name, precision, teacher_dtype, student_dtype, weight_dtype, make_model, make_module, fit, monkeypatch
):
    """Bodies and heads in the compute dtype, a teacher always in its own, what an estimator sees always in fp32."""
    student, teacher = make_model(1), make_model(2, teacher_dtype, hidden_size=24)
    seen = defaultdict(set)
    module = make_module(student, teacher, spying_estimator(name, seen))
    spy_on_bodies(student, teacher, seen)
    spy_on_heads(student, teacher, seen, monkeypatch)
    # What is tried out beforehand, in the dtype of the weights, is not what is measured.
    monkeypatch.setattr(forward, "disagreement", lambda model, way: None)
    monkeypatch.setattr(local, "reads_together", lambda policy: True)
    record = fit(module, precision=precision, limit_val_batches=1)
    assert seen["sample"] == seen["train"] == seen["student head"] == {student_dtype}
    assert seen["teacher"] == seen["teacher head"] == {teacher_dtype}
    assert seen["estimator"] == {FP32}
    assert record.rollouts[0].sampler_logps_BT.dtype == FP32
    assert {g.dtype for g in record.gradients[0].values()} == {weight_dtype}
    assert {p.dtype for p in student.parameters()} == {weight_dtype}
    assert all(g.any() for g in record.gradients[0].values()), "a parameter got no gradient"


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_reference_too_runs_in_its_own_dtype(precision, dtype, make_model, make_module, fit):
    student, reference, seen = make_model(1), make_model(3, dtype, hidden_size=24), defaultdict(set)

    @estimators.register_estimator("against_reference", needs="token+reference")
    def against_reference(tokens):
        seen["estimator"].add(tokens.reference_logps_BT.dtype)
        return Estimate(tokens.student_logps_BT - tokens.reference_logps_BT, tokens.student_logps_BT.detach())

    module = make_module(student, make_model(2), "against_reference", reference=reference)
    spy_on_bodies(student, reference, seen)
    fit(module, precision=precision)
    assert seen["teacher"] == {dtype}
    assert seen["estimator"] == {FP32}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_bf16_weights_do_not_make_counts_or_sums_bf16(aggregation, make_model, make_module, fit):
    """Under bf16-true torch's default dtype is bf16, whose integers end at 256; a loss of 1 a token must stay 1."""

    def one_a_token(tokens):
        logps = tokens.student_logps_BT
        return Estimate(1 + logps - logps.detach(), torch.ones_like(logps.detach()))

    module = make_module(make_model(1), make_model(2), one_a_token, aggregation=aggregation,
                         rollout={"max_new_tokens": 30, "num_completions": 8},
                         optim={"micro_batch_tokens": 1})  # fmt: skip
    record = fit(module, precision="bf16-true")
    mask = record.rollouts[0].mask_BT
    assert mask.sum() > 300
    logged = {name: value.item() for name, value in record.metrics[0].items()}
    assert logged["train/loss"] == pytest.approx(1, rel=1e-5)
    assert logged["train/reverse_kl"] == pytest.approx(1, rel=1e-5)
    assert logged["rollout/length"] == pytest.approx(mask.sum(1).double().mean().item(), rel=1e-6)


def relative_distance(found, expected):
    difference = sum((found[n] - expected[n]).square().sum() for n in expected)
    return (difference / sum(g.square().sum() for g in expected.values())).sqrt().item()


def test_every_update_under_autocast_uses_the_weights_it_starts_from(make_model, make_module, fit, full_logits):
    """Sampling keeps bf16 copies of the weights; neither the next update nor the next rollout may see old ones."""
    student, teacher = make_model(1), make_model(2)
    module = make_module(copy.deepcopy(student), teacher, optim={"updates_per_rollout": 2, "lr": 0.3})
    record = fit(module, 4, precision="bf16-mixed")
    assert len(record.rollouts) == 2

    def reference(weights, rollout):
        student.load_state_dict(weights)
        student.zero_grad()
        # The same bf16 products: what is measured is which weights they are of, not their rounding.
        with torch.autocast("cpu", torch.bfloat16):
            p = full_logits(student, rollout).float().log_softmax(-1)[rollout.mask_BT]
        q = full_logits(teacher, rollout).log_softmax(-1)[rollout.mask_BT]
        (p.exp() * (p - q)).sum(-1).mean().backward()
        return {n: p.grad for n, p in student.named_parameters()}

    for step in range(4):
        rollout = record.rollouts[step // 2]
        half = rollout.rows(torch.arange(len(rollout)).chunk(2)[step % 2])
        right = relative_distance(record.gradients[step], reference(record.weights[step], half))
        assert right < 0.05
        if step:
            stale = relative_distance(record.gradients[step], reference(record.weights[step - 1], half))
            assert stale > 2 * right
    for step, rollout in ((0, record.rollouts[0]), (2, record.rollouts[1])):
        student.load_state_dict(record.weights[step])
        logps = full_logits(student, rollout).log_softmax(-1).gather(-1, rollout.ids_BT[..., None])[..., 0]
        gap = (logps - rollout.sampler_logps_BT)[rollout.mask_BT].abs().mean()
        assert gap < 0.1
