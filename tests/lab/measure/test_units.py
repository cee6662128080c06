"""Gradients of units against a loss written out, and micro-batches against the unit at once."""

from dataclasses import replace

import pytest
import torch
from references import rollout_from

from lit_opd import estimators, models
from lit_opd.config import StudentConfig, TeacherConfig, load_config
from lit_opd.distiller import Distiller
from lit_opd.lab.measure.units import allocated_mb, unit_gradient
from lit_opd.models import LanguageModel
from lit_opd.teachers import LocalScorer
from lit_opd.types import FinishReason, SamplingLaw

TINY = load_config([], ["student.path=${lit_opd:tiny/student}", "teacher.path=${lit_opd:tiny/teacher}"])


@pytest.fixture(scope="module")
def distiller():
    estimator = estimators.build("full_vocab")
    sections = StudentConfig(path=TINY.student.path), TeacherConfig(path=TINY.teacher.path, dtype="float32")
    pair = models.Pair(*sections, estimator)
    student = pair.student.to(torch.device("cpu"))
    scorers = {"teacher": LocalScorer(pair.load("teacher", torch.device("cpu")), 64)}
    return Distiller(student, estimator, None, scorers, head_rows=64, micro_batch_tokens=10_000)


@pytest.fixture(scope="module")
def parameters(distiller):
    return list(distiller.student.model.parameters())


@pytest.fixture(scope="module")
def rollout():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 12, (1, 5), generator=generator).expand(3, 5)
    ids, mask = torch.randint(3, 12, (3, 6), generator=generator), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return rollout_from(prompt, torch.ones(3, 5, dtype=torch.bool), ids, mask, mask, torch.zeros(3, 6),
                   torch.full((3,), FinishReason.LENGTH), SamplingLaw(), torch.zeros(3, dtype=torch.long))  # fmt: skip


def test_a_unit_is_the_mean_over_completions_of_their_summed_losses(distiller, parameters, rollout):
    """Against all logits at once, and autograd."""
    reverse_kl = estimators.build("full_vocab", divergence="reverse_kl")
    found = unit_gradient(distiller.with_estimator(reverse_kl), parameters, rollout)
    ids = torch.cat([rollout.prompts.ids_BP, rollout.ids_BT], dim=1)
    logps = distiller.student.causal_lm(ids).logits[:, 4:-1].log_softmax(-1)
    with torch.no_grad():
        teacher = distiller.scorers["teacher"].model.causal_lm(ids).logits[:, 4:-1].log_softmax(-1)
    kl_BT = (logps.exp() * (logps - teacher)).sum(-1)
    loss = (kl_BT * rollout.mask_BT).sum(1).mean()
    expected = torch.autograd.grad(loss, parameters)
    for mine, other in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert found.token_norms_N.shape == (int(rollout.mask_BT.sum()),)
    assert (found.token_norms_N > 0).all()
    assert found.seconds > 0


def test_a_parameter_without_a_part_in_the_loss_has_gradient_zero(distiller, rollout):
    extra = torch.nn.Parameter(torch.ones(3))
    (gradient,) = unit_gradient(distiller.with_estimator(estimators.build("token")), [extra], rollout).gradients
    assert (gradient == 0).all()


def unit(lengths, seed=0):
    """Completions of these lengths, two a prompt; the second counts nowhere."""
    generator, rows, longest = torch.Generator().manual_seed(seed), len(lengths), max(lengths)
    prompts = torch.randint(3, 12, (rows // 2, 5), generator=generator).repeat_interleave(2, 0)
    ids = torch.randint(3, 12, (rows, longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    counted = mask & (torch.arange(rows) != 1)[:, None]
    return rollout_from(prompts, torch.ones(rows, 5, dtype=torch.bool), ids, mask, counted, torch.full(ids.shape, -1.5),
                   torch.full((rows,), FinishReason.LENGTH), SamplingLaw(), torch.arange(rows) // 2)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "budget", "whole_prompts"),
    [("full_vocab", 30, False), ("token", 1, False), ("leave_one_out", 30, True), ("outcome_mix", 1, True)],
)
def test_micro_batches_within_the_budget_add_up_to_the_unit(
    distiller, parameters, name, budget, whole_prompts, monkeypatch
):
    rollout, seen = unit([3, 9, 12, 2, 7, 7]), []
    rollout = replace(rollout, rewards_B=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    distiller, hidden = distiller.with_estimator(estimators.build(name)), LanguageModel.hidden

    def spy(model, rollout):
        if model is distiller.student:
            seen.append(rollout)
        return hidden(model, rollout)

    monkeypatch.setattr(LanguageModel, "hidden", spy)
    whole = unit_gradient(distiller, parameters, rollout)
    assert len(seen) == 1
    seen.clear()
    found = unit_gradient(replace(distiller, micro_batch_tokens=budget), parameters, rollout)
    alone = 2 if whole_prompts else 1
    assert len(seen) > 1
    for micro in seen:
        width = micro.prompts.ids_BP.shape[1] + micro.ids_BT.shape[1]
        assert len(micro) == alone or len(micro) * width <= budget
        assert not whole_prompts or (micro.prompt_index_B.bincount() % 2 == 0).all()
    scale = max(gradient.abs().max() for gradient in whole.gradients)
    for mine, other in zip(found.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6 * scale, rtol=1e-5)
    torch.testing.assert_close(found.token_norms_N.sort()[0], whole.token_norms_N.sort()[0], atol=1e-6, rtol=1e-4)


def test_allocated_memory_is_the_most_that_is_held_at_once():
    def run():
        first = torch.ones(2_000_000)
        second = torch.ones(1_000_000)
        del first, second
        return torch.ones(500_000)

    assert allocated_mb(run, torch.device("cpu")) == pytest.approx(12.0, abs=0.5)
