"""The discount that is chosen from measured bias and variance."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from references import scored

from lit_opd import estimators
from lit_opd.callbacks import ChooseGamma, check_gamma
from lit_opd.errors import UserError
from lit_opd.functional import token_weights
from lit_opd.models import LanguageModel
from lit_opd.objective.credit import _signs, credit_sketches
from lit_opd.types import SamplingLaw

GAMMAS = (0.0, 0.5, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1.7, None), (1.0, 2.0), (1.7, 2.0)])
def test_sketches_are_projections_of_the_gradient_of_the_head(
    scale, softcap, temperature, make_model, tiny_tokenizer, make_batch, sample, full_logits
):
    """Every completion's gradient by autograd through dense logits, projected afterwards."""
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64, hidden_size=24)
    student.config.logit_scale, student.config.final_logit_softcapping = scale, softcap
    policies = [LanguageModel(m, tiny_tokenizer, k) for m, k in ((student, "student"), (teacher, "teacher"))]
    policies[0].temperature = temperature
    rollout = sample(student, make_batch(), SamplingLaw(), num_completions=2)
    rollout = rollout.uncount(rollout.ids_BT == 7)
    candidates = [estimators.build("hybrid", gamma=gamma) for gamma in GAMMAS]
    micro = scored(rollout, candidates[0], policies[1])
    tokens, sequences = rollout.mask_BT.sum().double(), rollout.mask_BT.any(1).sum().double()
    weights_BT = token_weights(rollout.mask_BT, "sequence_mean", tokens, sequences)
    found = credit_sketches(policies[0], micro, candidates, weights_BT, rows=3, size=4, seed=5)

    logits = scale * full_logits(student, rollout), full_logits(teacher, rollout)
    capped = logits[0] if softcap is None else softcap * torch.tanh(logits[0] / softcap)
    logps, taught = (x.log_softmax(-1).gather(-1, rollout.ids_BT[..., None])[..., 0]
                     for x in (capped / temperature, logits[1]))  # fmt: skip
    weight_VH = student.lm_head.weight
    left, right = _signs(17, 4, 5, weight_VH), _signs(16, 4, 6, weight_VH)
    for m, gamma in enumerate(GAMMAS):
        for b in range(len(rollout)):
            loss = 0
            for t in range(logps.shape[1]):
                later = [gamma ** (i - t) * (logps[b, i] - taught[b, i]).detach()
                         for i in range(t, logps.shape[1]) if rollout.mask_BT[b, i]]  # fmt: skip
                loss = loss + weights_BT[b, t] * sum(later) * logps[b, t]
            (gradient_VH,) = torch.autograd.grad(loss, weight_VH, retain_graph=True)
            torch.testing.assert_close(found[m, b], (left.T @ gradient_VH @ right).flatten(), rtol=0, atol=1e-11)


def test_samples_are_prompts_and_their_mean_is_the_step(make_model, make_module, make_trainer, make_data):
    """Whatever the cut into micro-batches; the gradient of the head, projected, is the mean over prompts."""
    from lit_opd.callbacks import gamma as room

    found = {}
    for budget in (10_000, 30):
        module = make_module(make_model(1, torch.float64), make_model(2, torch.float64), "leave_one_out",
                             estimator_kwargs={"gamma": 0.5}, optim={"micro_batch_tokens": budget})  # fmt: skip
        kept, step = [], []

        class Peek(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                kept.append(room._prompt_gradients(pl_module, batch, [pl_module.estimator]))  # noqa: B023

            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                step.append(pl_module.model.lm_head.weight.grad.clone())  # noqa: B023

        make_trainer(1, callbacks=[Peek()], precision="64-true").fit(module, make_data())
        assert kept[0].shape[:2] == (1, 5)
        left, right = _signs(17, 16, 0, step[0]), _signs(16, 16, 1, step[0])
        torch.testing.assert_close(kept[0].mean(1)[0], (left.T @ step[0] @ right).flatten(), rtol=0, atol=1e-7)
        found[budget] = kept[0]
    torch.testing.assert_close(found[30], found[10_000], rtol=0, atol=1e-7)


def test_two_processes_share_the_bias_and_halve_the_variance(monkeypatch):
    """Each sees half of the prompts; here both halves are the same numbers, so that a sum over processes doubles."""
    from lit_opd.callbacks import gamma as room
    from lit_opd.functional.tradeoff import squared_bias_and_variance

    half_MPF = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(room, "_prompt_gradients", lambda *_: half_MPF)
    monkeypatch.setattr(room, "_over_processes", lambda _, values_M: 2 * values_M)
    distiller = SimpleNamespace(with_estimator=lambda estimator: estimator)
    module = SimpleNamespace(global_step=0, estimator=estimators.build("hybrid"), distiller=distiller, at_step=dict,
                             log_dict=lambda *_, **__: None)  # fmt: skip
    chooser = ChooseGamma(every_n_steps=2, gammas=GAMMAS)
    trainer = SimpleNamespace(world_size=2, precision_plugin=SimpleNamespace(train_step_context=nullcontext))
    chooser.on_train_batch_start(trainer, module, None, 0)
    bias_M, variance_M = squared_bias_and_variance(half_MPF, unbiased=2)
    torch.testing.assert_close(chooser.squared_bias, bias_M)
    torch.testing.assert_close(chooser.variance, variance_M / 2)


def run(make_module, make_model, fit, teacher=2, steps=3, **kwargs):
    chooser = ChooseGamma(every_n_steps=2, gammas=GAMMAS)
    module = make_module(make_model(1), make_model(teacher), "hybrid", estimator_kwargs={"gamma": 0.75})
    record = fit(module, steps, callbacks=[chooser], **kwargs)
    return chooser, module, record


def test_choice_is_the_least_error_and_is_logged(make_module, make_model, fit):
    chooser, module, record = run(make_module, make_model, fit)
    error = chooser.squared_bias.clamp(min=0) + chooser.variance
    assert chooser.chosen == GAMMAS[int(error.argmin())]
    assert module.estimator.kwargs["gamma"] == chooser.chosen
    assert record.metrics[-1]["train/gamma"] == chooser.chosen
    assert chooser.squared_bias[-1] == 0
    assert chooser.variance[0] < chooser.variance[-1]
    assert chooser.next_at == 4


def test_where_student_equals_teacher_there_is_nothing_to_trade(make_module, make_model, fit):
    chooser, _, _ = run(make_module, make_model, fit, teacher=1, steps=1)
    assert chooser.squared_bias.abs().max() < 1e-9
    assert chooser.variance.abs().max() < 1e-9
    assert chooser.chosen == 0


def test_choosing_does_not_change_what_is_sampled(make_module, make_model, fit):
    """The rollout that is judged is the very one the step then samples."""
    _, _, record = run(make_module, make_model, fit, steps=1)
    judged, stepped = record.rollouts
    assert torch.equal(judged.ids_BT, stepped.ids_BT)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_it_judges_in_the_arithmetic_of_the_step(make_module, make_model, fit, monkeypatch, precision, dtype):
    from lit_opd.callbacks import gamma as room

    seen, inner = [], room._prompt_gradients

    def spy(*arguments):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return inner(*arguments)

    monkeypatch.setattr(room, "_prompt_gradients", spy)
    run(make_module, make_model, fit, steps=1, precision=precision)
    assert seen == [dtype]


def test_a_resumed_run_goes_on_with_what_was_measured(make_module, make_model, fit, tmp_path):
    whole, module, record = run(make_module, make_model, fit, steps=6)
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    first = ChooseGamma(every_n_steps=2, gammas=GAMMAS)
    fresh = make_module(make_model(1), make_model(2), "hybrid", estimator_kwargs={"gamma": 0.75})
    fit(fresh, 3, callbacks=[first, save], enable_checkpointing=True)
    second = ChooseGamma(every_n_steps=2, gammas=GAMMAS)
    resumed = make_module(make_model(1), make_model(2), "hybrid", estimator_kwargs={"gamma": 0.75})
    again = fit(resumed, 6, callbacks=[second], ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert second.chosen == whole.chosen
    torch.testing.assert_close(second.squared_bias, whole.squared_bias, rtol=0, atol=0)
    for name, weight in record.weights[-1].items():
        assert torch.equal(again.weights[-1][name], weight), name


def test_what_has_no_discount_is_refused(make_model):
    with pytest.raises(UserError, match="expected an estimator with a keyword gamma, found token"):
        check_gamma(estimators.build("token"))
    discounted = copy.copy(estimators.build("hybrid", gamma=0.5))
    check_gamma(discounted)


def test_what_stays_biased_without_discount_is_refused():
    from lit_opd.estimators.sequence import discounted_reverse_kl

    @estimators.register_estimator("half", family="sequence", target="sequence_reverse_kl")
    def half(tokens, *, gamma=0.5):
        return discounted_reverse_kl(tokens, gamma / 2)

    with pytest.raises(UserError, match="unbiased at gamma = 1, against which bias is measured, found half"):
        check_gamma(estimators.build("half"))
