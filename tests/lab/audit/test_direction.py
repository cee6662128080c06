import copy

import pytest
import torch

from lit_opd.config import OptimConfig
from lit_opd.lab.audit.direction import _held, divergence_on_probe, sign_test
from lit_opd.types import Estimate


def sgd(lr, **more):
    return OptimConfig(name="SGD", lr=lr, clip_norm=None, **more)


def test_the_divergence_is_that_of_plain_forward_passes(make_evidence, full_logits):
    evidence = make_evidence(masked=(5,))
    student, teacher = (
        full_logits(m.model, evidence.rollout).log_softmax(-1) for m in (evidence.student, evidence.teacher)
    )
    mask = evidence.rollout.mask_BT
    reverse = (student.exp() * (student - teacher)).sum(-1)[mask].mean().item()
    forward = (teacher.exp() * (teacher - student)).sum(-1)[mask].mean().item()
    assert divergence_on_probe(evidence, "reverse_kl", {}) == pytest.approx(reverse, rel=1e-4)
    assert divergence_on_probe(evidence, "forward_kl", {}) == pytest.approx(forward, rel=1e-4)


def test_the_teachers_temperature_is_part_of_what_is_aimed_at(make_evidence):
    evidence = make_evidence()
    before = divergence_on_probe(evidence, "reverse_kl", {})
    evidence.teacher.temperature = 3.0
    assert divergence_on_probe(evidence, "reverse_kl", {}) != pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("estimator", ["full_vocab", "token"])
def test_a_step_of_a_right_estimator_lowers_the_divergence(make_evidence, estimator):
    found = sign_test(make_evidence(estimator=estimator))
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.numbers["after"] < found.numbers["before"]
    assert (
        found.numbers["cosine"] == pytest.approx(1.0, abs=1e-5)
        if estimator == "full_vocab"
        else found.numbers["cosine"] > 0
    )
    assert found.found.startswith("one step takes reverse kl from ")


def test_the_declared_target_is_what_is_measured(make_evidence):
    found = sign_test(make_evidence(estimator="full_vocab", divergence="jsd", teacher_weight=0.3))
    assert found.verdict == "pass"
    assert found.found.startswith("one step takes jsd from ")
    assert found.numbers["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_the_students_weights_stay_as_they_were(make_evidence):
    evidence = make_evidence()
    before = copy.deepcopy(evidence.student.model.state_dict())
    sign_test(evidence)
    assert all(torch.equal(value, before[name]) for name, value in evidence.student.model.state_dict().items())


def test_a_wrong_sign_fails(make_evidence, register):
    register("uphill", lambda ratio, logps: -ratio * logps, target="reverse_kl", unbiased=True)
    found = sign_test(make_evidence(estimator="uphill"))
    assert found.verdict == "fail"
    assert found.numbers["cosine"] < 0
    assert found.numbers["along_exact"] < -3
    assert found.fix.startswith("The gradient points uphill: look for a wrong sign in the estimator")


def test_a_wrong_sign_of_an_unregistered_function_fails_too(make_evidence):
    def mine(tokens):
        ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
        return Estimate(-ratio * tokens.student_logps_BT, ratio)

    assert sign_test(make_evidence(estimator=mine)).verdict == "fail"


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_a_step_that_is_too_long_is_told_from_a_wrong_direction(make_evidence, lr):
    found = sign_test(make_evidence(optim=sgd(lr)))
    assert found.verdict == "warn"
    assert found.numbers["after"] > found.numbers["before"]
    assert (found.numbers["shorter"] < found.numbers["before"]) == (lr < 1)
    assert found.fix == "The step is too long: lower optim.lr, or set optim.warmup_steps."


def coarse(models):
    return copy.deepcopy(models[0]).to(torch.bfloat16)


@pytest.mark.parametrize("optim", [sgd(1e-9), OptimConfig(lr=1e-9)], ids=["SGD", "AdamW"])
def test_a_step_below_the_rounding_of_the_weights_is_told_from_one_that_is_too_long(make_evidence, models, optim):
    found = sign_test(make_evidence(coarse(models), optim=optim))
    assert found.verdict == "warn"
    assert found.numbers["held"] > 0.99
    assert "of the weights are the same after it, for the step is below the rounding of bfloat16" in found.found
    assert found.fix == (
        "Keep the weights in float32 (student.dtype=float32, trainer.precision=bf16-mixed), set "
        "optim.name=StochasticAdamW, or raise optim.lr."
    )


def test_weights_that_no_gradient_pushes_are_not_held_by_rounding():
    weight, idle = (torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0])) for _ in range(2))
    weight.grad = torch.tensor([0.0, 0.0, 0.5, -0.5])
    start = [torch.tensor([1.0, 2.0, 3.0, 9.0]), idle.detach().clone()]
    assert _held([weight, idle], start) == 0.5
    assert _held([idle], start[1:]) == 0


def test_warm_up_shortens_the_step(make_evidence):
    change = [abs(f.numbers["after"] - f.numbers["before"]) for f in
              (sign_test(make_evidence(optim=sgd(0.001, warmup_steps=w))) for w in (0, 9))]  # fmt: skip
    assert change[1] == pytest.approx(change[0] / 10, rel=0.2)


def test_an_estimator_that_aims_elsewhere_is_only_told(make_evidence, register):
    register("elsewhere", lambda ratio, logps: -ratio * logps)
    found = sign_test(make_evidence(estimator="elsewhere"))
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found.endswith("; the estimator aims elsewhere")


def test_a_sequence_target_is_never_failed_on_fixed_prefixes(make_evidence, register):
    register("uphill_sequence", lambda ratio, logps: -ratio * logps, target="sequence_reverse_kl")
    found = sign_test(make_evidence(estimator="uphill_sequence"))
    assert found.verdict == "warn"
    assert found.fix.startswith("The batch may be too small for this estimator")


def test_equal_models_have_nothing_to_lower(make_evidence, models):
    found = sign_test(make_evidence(teacher=models[0]))
    assert found.verdict == "pass"
    assert found.found.startswith("nothing to lower: reverse kl is ")
