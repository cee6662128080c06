"""The models of a run in training: the teacher's temperature, the reference, and how much of the run is done."""

import copy

import pytest
import torch

from lit_opd import DistillationModule
from lit_opd.config import FrozenConfig, TeacherConfig
from lit_opd.types import Estimate

SETTINGS = {"optim": {"name": "SGD", "lr": 0.1}, "rollout": {"max_new_tokens": 6, "num_completions": 2}}


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


# The teacher's temperature


@pytest.mark.parametrize(("name", "kwargs"), [
    ("token", {}), ("teacher_topk", {"k": 4}), ("full_vocab", {"divergence": "forward_kl"}),
    ("mix", {"terms": {"sequence": 1.0, "full_vocab": 1.0, "teacher_topk": {"weight": 1.0, "k": 3}}}),
])  # fmt: skip
def test_a_warm_teacher_is_one_with_smaller_logits(name, kwargs, make_model, save_model, make_module, fit):
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    cold = make_module(copy.deepcopy(student), copy.deepcopy(teacher), name, estimator_kwargs=kwargs)
    config = TeacherConfig(save_model(teacher), dtype="float64", temperature=2.5)
    warm = make_module(copy.deepcopy(student), config, name, estimator_kwargs=kwargs)
    with torch.no_grad():
        teacher.lm_head.weight.div_(2.5)
    divided = make_module(copy.deepcopy(student), teacher, name, estimator_kwargs=kwargs)
    found, expected, other = (fit(m, precision="64-true").gradients[0] for m in (warm, divided, cold))
    for gradient, value in expected.items():
        torch.testing.assert_close(found[gradient], value, rtol=0, atol=1e-12)
    assert not torch.allclose(found["lm_head.weight"], other["lm_head.weight"], rtol=1e-3)


@pytest.mark.parametrize("judged", ["student", "teacher"])
def test_no_temperature_of_the_teacher_reaches_an_evaluation(judged, student_path, teacher_path, make_trainer,
                                                             make_data):  # fmt: skip
    """Neither the yardsticks nor, where the teacher itself is measured, its completions."""
    found = []
    for temperature in (1.0, 5.0):
        module = DistillationModule(student_path, TeacherConfig(teacher_path, temperature=temperature), **SETTINGS)
        module.judged = judged
        make_trainer(limit_val_batches=1).validate(module, make_data(), verbose=False)
        found.append((module.results, [example.completion for example in module.examples]))
    assert found[0] == found[1]
    assert found[0][1]


# The reference


def test_the_reference_is_nowhere_but_in_use(against_reference, make_model, make_module, fit):
    student, reference = make_model(1), make_model(3).train()
    before = weights(reference)
    module = make_module(student, make_model(2), "against_reference", reference=reference)
    record = fit(module, 2)
    module.train()
    assert all(g.any() for g in record.gradients[0].values())
    assert module.state_dict().keys() == {f"model.{name}" for name in student.state_dict()}
    assert sum(1 for _ in module.parameters()) == sum(1 for _ in student.parameters())
    assert not any(part.training for part in reference.modules())
    assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())
    assert same(weights(reference), before)


def test_the_reference_gets_weights_only_where_training_asks_for_it(
    against_reference, make_model, make_trainer, make_data, student_path, teacher_path
):
    evaluated = DistillationModule(student_path, teacher_path, "against_reference", **SETTINGS)
    make_trainer(limit_val_batches=1).validate(evaluated, make_data(), verbose=False)
    assert evaluated.distiller.scorers.keys() == {"teacher"}
    other = DistillationModule(student_path, teacher_path, "token", reference="/nowhere", **SETTINGS)
    make_trainer().fit(other, make_data())
    assert other.distiller.scorers.keys() == {"teacher"}


def test_a_student_does_not_differ_from_the_reference_it_starts_as(against_reference, make_model, make_module, fit):
    found = []
    for reference in (None, make_model(3, torch.float64)):
        module = make_module(make_model(1, torch.float64), make_model(2), "against_reference", reference=reference)
        found.append(fit(module, precision="64-true").gradients[0]["lm_head.weight"].abs().max())
    assert found[0] < 1e-12 < found[1]


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_resumed_run_keeps_the_reference_it_began_with(
    in_memory, against_reference, make_model, save_model, teacher_path, tiny_tokenizer, fit, tmp_path
):
    """The untrained student: not the weights in the checkpoint."""
    path = save_model(make_model(1))

    def module():
        student = make_model(1) if in_memory else path
        settings = copy.deepcopy(SETTINGS) | {"estimator": "mix", "reference": FrozenConfig(dtype="float32")}
        terms = {"terms": {"against_reference": 1.0, "full_vocab": 1.0}}
        return DistillationModule(student, teacher_path, estimator_kwargs=terms, tokenizer=tiny_tokenizer, **settings)

    whole, half, resumed = module(), module(), module()
    fit(whole, 4)
    fit(half, 2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 4, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(resumed.distiller.scorers["reference"].model.model), weights(make_model(1)))
    assert same(weights(resumed.model), weights(whole.model))
    assert not same(weights(half.model), weights(whole.model))


# How much of the run is done


@pytest.mark.parametrize(("limits", "updates", "expected"), [
    ({"max_steps": 4}, 1, [0, 0.25, 0.5, 0.75]),
    ({"max_steps": 4}, 2, [0, 0.5]),
    ({"max_steps": -1, "max_epochs": 3}, 1, [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]),
    ({"max_steps": -1, "max_epochs": 2}, 2, [0, 0.25, 0.5, 0.75]),
    ({"max_steps": 3, "max_epochs": 9}, 1, [0, 1 / 3, 2 / 3]),
    ({"max_steps": 99, "max_epochs": 2}, 2, [0, 0.25, 0.5, 0.75]),
    ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 1}, 1, [0, 0.5]),
])  # fmt: skip
def test_progress_is_the_share_of_the_steps_that_end_the_run(
    limits, updates, expected, make_model, make_module, make_data, fit
):
    """Two batches of two prompts an epoch; every update of a rollout sees the progress at which it was sampled."""
    seen = []

    def watching(tokens):
        seen.append(tokens.progress)
        return Estimate(tokens.student_logps_BT, tokens.student_logps_BT.detach())

    module = make_module(make_model(1), make_model(2), watching, optim={"updates_per_rollout": updates})
    rest = {key: value for key, value in limits.items() if key != "max_steps"}
    fit(module, limits["max_steps"], make_data(batch_size=2), **rest)
    assert seen[::updates] == pytest.approx(expected)
    assert len(seen) == len(expected) * updates


def test_a_run_without_end_makes_no_progress(make_model, make_module, make_data, make_trainer):
    module = make_module(make_model(1), make_model(2))
    trainer = make_trainer(-1, max_epochs=-1, max_time={"seconds": 1})
    trainer.fit(module, make_data())
    assert module.global_step > 0
    assert module.progress == 0.0
