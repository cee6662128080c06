"""Before the first update: what the engine recorded is what the student that trains says."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lit_opd.errors import UserError
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, check_gap, gap_sums
from lit_opd.types import Author, SamplingLaw


class Recorded(LocalEngine):
    """The local engine, its log-probabilities shifted."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def sample(self, *args):
        rollout = super().sample(*args)
        return replace(rollout, sampler_logps_BT=rollout.sampler_logps_BT + self.shift)


@pytest.fixture
def policy(make_model, tiny_tokenizer):
    return LanguageModel(make_model(1), tiny_tokenizer, "student")


def measured(policy, rollout):
    sums = {name: float(value) for name, value in gap_sums(policy, rollout, rows=5).items()}
    return (sums["squares"] / sums["tokens"]) ** 0.5 if sums["tokens"] else math.nan


LAWS = [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 9}, {"temperature": 0.0}, {"min_new_tokens": 3}]


@pytest.mark.parametrize("law", LAWS)
def test_the_gap_is_rounding_under_every_law_and_measured_where_it_is_not(law, policy, make_batch, sample):
    rollout = sample(policy.model, make_batch(), SamplingLaw(**law), num_completions=2)
    assert measured(policy, rollout) < 1e-5
    off = replace(rollout, sampler_logps_BT=rollout.sampler_logps_BT + 0.25)
    assert measured(policy, off) == pytest.approx(0.25, abs=1e-4)


def test_tokens_of_others_are_left_out(policy, make_batch, sample):
    rollout = sample(policy.model, make_batch(), SamplingLaw(), num_completions=2)
    shifted = replace(rollout, sampler_logps_BT=rollout.sampler_logps_BT + 1)
    theirs = replace(shifted, author_BT=torch.full_like(rollout.author_BT, Author.TEACHER))
    assert math.isnan(measured(policy, theirs))
    half = rollout.author_BT.clone()
    half[::2] = Author.DATA
    gaps = torch.where(half[:, :1] == Author.DATA, 1.0, 0.125)
    mixed = replace(rollout, author_BT=half, sampler_logps_BT=rollout.sampler_logps_BT + gaps)
    assert measured(policy, mixed) == pytest.approx(0.125, abs=1e-4)


def test_the_bound_follows_arithmetic_and_engine(policy):
    check_gap(policy, LocalEngine(), squares=10 * 9e-5**2, tokens=10)
    with pytest.raises(UserError) as error:
        check_gap(policy, LocalEngine(), squares=10 * 0.15**2, tokens=10)
    assert str(error.value) == (
        "student.path: expected sampler and trainer to give a token of the student one log-probability, to 0.0001 "
        "nats, found 0.15 nats between them (root of the mean square over 10 tokens). LlamaModel decodes otherwise "
        "than it scores: name another student."
    )
    check_gap(policy, object(), squares=10 * 0.15**2, tokens=10)
    with pytest.raises(UserError, match=r"rollout.engine: .* to 0.2 nats, found 0.3 nats .* compare roll"):
        check_gap(policy, object(), squares=10 * 0.3**2, tokens=10)
    check_gap(policy, LocalEngine(), squares=0.0, tokens=0)
    check_gap(policy, LocalEngine(), squares=math.nan, tokens=10)  # the step tells what is not finite
    policy.model.to(torch.bfloat16)
    check_gap(policy, LocalEngine(), squares=10 * 0.15**2, tokens=10)


def test_training_begins_with_the_proof(make_model, make_module, fit):
    assert len(fit(make_module(make_model(1), make_model(2))).rollouts) == 1
    module = make_module(make_model(1), make_model(2), engine=Recorded(0.01))
    before = [p.clone() for p in module.model.parameters()]
    with pytest.raises(UserError, match=r"found 0\.01 nats between them"):
        fit(module)
    assert all(torch.equal(old, new) for old, new in zip(before, module.model.parameters(), strict=True))


def test_evaluations_begin_with_the_proof_too(make_model, make_module, make_data, make_trainer):
    module = make_module(make_model(1), make_model(2), engine=Recorded(0.01))
    with pytest.raises(UserError, match=r"student\.path: expected sampler and trainer .* LlamaModel decodes otherwise"):
        make_trainer(limit_val_batches=1).validate(module, make_data(), verbose=False)
    module.engine.shift = 0
    make_trainer(limit_val_batches=1).validate(module, make_data(), verbose=False)


def test_a_student_that_trains_otherwise_than_it_samples_is_refused(make_model, make_module, fit):
    """A layer that, unlike dropout, nobody knows to change a student in train mode."""

    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.3 * torch.randn_like(x) if self.training else x

    student = make_model(1)
    student.model.layers[0].mlp.act_fn = nn.Sequential(student.model.layers[0].mlp.act_fn, Noise())
    module = make_module(student, make_model(2))
    student.model.layers[0].mlp.train()
    with pytest.raises(UserError, match=r"LlamaModel decodes otherwise than it scores"):
        fit(module)
