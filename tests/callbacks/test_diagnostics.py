"""What a run logs of its steps while it trains."""

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lit_opd.callbacks import StepDiagnostics
from lit_opd.measures.steps import observed_tokens, token_numbers


class Kept(DummyLogger):
    """Keeps what it is given of diagnostics, by step."""

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        if "advantage/mean" in metrics or "gradient/clipped_frac" in metrics:
            self.steps[step] = dict(metrics)


@pytest.fixture
def diagnose(make_model, make_module, fit):
    def run(every=1, steps=4, estimator="token", **kwargs):
        module = make_module(make_model(1), make_model(2), estimator, **kwargs)
        logger = Kept()
        record = fit(module, steps, logger=logger, log_every_n_steps=1, callbacks=[StepDiagnostics(every)])
        return module, record, logger.steps

    return run


def test_it_looks_every_so_many_steps_and_changes_nothing(diagnose, make_model, make_module, fit):
    _, record, steps = diagnose(every=2, steps=5)
    assert list(steps) == [2, 4]
    plain = fit(make_module(make_model(1), make_model(2), "token"), 5)
    for name, weight in plain.weights[-1].items():
        assert torch.equal(record.weights[-1][name], weight)


def test_numbers_are_of_the_rollout_of_the_step(diagnose, full_logits, make_model):
    """Against dense logits of the student as it was before the step."""
    module, record, steps = diagnose(steps=2, optim={"micro_batch_tokens": 30})
    assert len(module.seen) > 1
    rollout, student, teacher = record.rollouts[1], make_model(1), make_model(2)
    student.load_state_dict(record.weights[1])
    logps, taught = (
        full_logits(m, rollout).log_softmax(-1).gather(-1, rollout.ids_BT[..., None])[..., 0]
        for m in (student, teacher)
    )
    advantage = (taught - logps)[rollout.mask_BT]
    assert steps[2]["advantage/mean"] == pytest.approx(advantage.mean().item(), rel=1e-4)
    assert steps[2]["advantage/min"] == pytest.approx(advantage.min().item(), rel=1e-4)
    assert steps[2]["rollout/sampler_ess"] == pytest.approx(1, abs=1e-5)
    for quarter, columns in enumerate((slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)), start=1):
        mask = rollout.mask_BT[:, columns]
        wanted = -logps[:, columns][mask].mean().item()
        assert steps[2][f"train_position/student_nll_q{quarter}"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("limit", "share"), [(1e-6, 1.0), (1e6, 0.0), (None, None)])
def test_it_counts_the_steps_whose_gradient_was_clipped(diagnose, limit, share):
    _, _, steps = diagnose(every=2, optim={"clip_norm": limit})
    assert [step.get("gradient/clipped_frac") for step in steps.values()] == [share, share]


def test_the_share_of_clipped_steps_is_of_those_since_the_last_look(diagnose):
    """The limit is passed by some steps only: the norms fall as the student learns."""
    limit = 6.5
    _, record, steps = diagnose(every=4, steps=8, optim={"clip_norm": limit, "lr": 1.0})
    clipped = [float(metrics["train/grad_norm"]) > limit for metrics in record.metrics]
    assert sum(clipped[:4]) != sum(clipped[4:])
    assert steps[4]["gradient/clipped_frac"] == sum(clipped[:4]) / 4
    assert steps[8]["gradient/clipped_frac"] == sum(clipped[4:]) / 4


def test_the_noise_scale_counts_completions(diagnose, monkeypatch):
    monkeypatch.setattr("lit_opd.callbacks.diagnostics.gradient_noise", lambda optimizer: (2.0, 6.0))
    _, record, steps = diagnose(steps=1)
    assert steps[1]["gradient/noise_scale"] == pytest.approx(3.0 * len(record.rollouts[0]))
    assert steps[1]["gradient/signal_to_noise"] == pytest.approx(1 / 3)


def test_a_signal_that_is_not_above_zero_has_no_noise_scale(diagnose, monkeypatch):
    monkeypatch.setattr("lit_opd.callbacks.diagnostics.gradient_noise", lambda optimizer: (-1.0, 6.0))
    _, _, steps = diagnose(steps=1)
    assert steps[1]["gradient/signal_to_noise"] == pytest.approx(-1 / 6)
    assert "gradient/noise_scale" not in steps[1]


def test_adam_tells_its_noise_and_plain_descent_does_not(diagnose):
    _, _, steps = diagnose(steps=3, optim={"name": "AdamW", "lr": 1e-3})
    assert ["gradient/signal_to_noise" in step for step in steps.values()] == [False, True, True]
    _, _, steps = diagnose(steps=3)
    assert not any("gradient/signal_to_noise" in step for step in steps.values())


def test_what_was_seen_is_of_the_last_update(diagnose):
    module, record, _ = diagnose(steps=1, optim={"updates_per_rollout": 2})
    rows = sum(len(rollout) for rollout, _ in module.seen)
    assert rows == len(record.rollouts[0]) / 2


def test_every_estimator_leaves_what_is_read(make_model, make_module, fit):
    """Families differ in the way to their numbers; the keys are the same."""
    found = {}
    for name in ("token", "full_vocab", "sequence", "leave_one_out", "hybrid"):
        module = make_module(make_model(1), make_model(2), name)
        fit(module)
        found[name] = token_numbers(observed_tokens(module.seen, horizon=6))
    first = found.pop("token")
    for numbers in found.values():
        assert numbers == pytest.approx(first, rel=1e-4), "one student, one teacher, one rollout"


def test_clips_and_masses_come_with_the_estimators_that_have_them(diagnose):
    _, _, steps = diagnose(steps=1, estimator="clipped_log_ratio", estimator_kwargs={"max_log_ratio": 0.5})
    assert 0 < steps[1]["train/clipped_frac"] < 1
    _, _, steps = diagnose(steps=1, estimator="teacher_topk", estimator_kwargs={"k": 4})
    assert 0 < steps[1]["train/student_mass_min"] < steps[1]["train/teacher_mass"] < 1
    _, _, steps = diagnose(steps=1, estimator="token")
    assert not {"train/clipped_frac", "train/student_mass_min"} & steps[1].keys()
