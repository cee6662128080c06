"""Models that are not built like Llama, decoded by their own code over states that stay, and captured so."""

import pytest
import torch
from architectures import ATTENTION, RECURRENT, build
from rollout.llamas import same
from rollout.tape import TapeRecorder

from lit_opd.functional import law_logps
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, captured, uniforms
from lit_opd.rollout.steady import SteadyDecoder
from lit_opd.types import SamplingLaw

PLAIN = SamplingLaw()
# Linear attention, convolutions and state spaces; windows, experts, sinks, soft-caps, latent attention.
OWN_CODE = {"qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "mamba", "gemma2", "gpt_oss", "mixtral", "deepseek_v3",
            "phi3", "gpt2"} & {*ATTENTION, *RECURRENT}  # fmt: skip


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(captured, "_NARROWEST", 16)
    monkeypatch.setattr(captured, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(captured, "_LOOK_EVERY", 3)


@pytest.fixture
def make_policy(tiny_tokenizer):
    def make(name):
        model = build(name, 0)
        model.generation_config.eos_token_id = [2, 5, 9, 11]
        return LanguageModel(model, tiny_tokenizer, "student")

    return make


def run(engine, policy, batch, law=PLAIN, length=20, completions=4):
    return engine.sample(policy, batch, law, completions, uniforms((0, 0), batch.draws, completions, length))


def captured_engine(policy):
    engine = LocalEngine(recorder=TapeRecorder, kernels=False)
    (verdict,) = engine.prove(policy, 20, 32, choice="fast")
    assert verdict.taken
    return engine


@pytest.mark.parametrize("name", sorted(OWN_CODE))
def test_captured_rollouts_are_those_of_the_plain_loop(name, make_policy, make_batch):
    """Beyond a window, with rows that leave, and their log-probabilities computed again in one pass of the model."""
    policy, batch = make_policy(name), make_batch()
    engine = captured_engine(policy)
    assert type(engine._captured[policy.model]._decoder) is SteadyDecoder
    for law in (PLAIN, SamplingLaw(temperature=0.0)):
        found = run(engine, policy, batch, law)
        same(found, run(LocalEngine(), policy, batch, law), atol=1e-5)
    assert policy.model in engine._captured, "a step failed"
    assert engine._captured[policy.model].captures > 2
    assert len(set(found.real_BT.sum(1).tolist())) > 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_log_probabilities_of_captured_steps_are_those_of_a_forward_pass(name, make_policy, make_batch):
    policy, batch, law = make_policy(name), make_batch(), SamplingLaw(temperature=0.8)
    rollout = run(captured_engine(policy), policy, batch, law)
    for row in range(len(rollout)):
        prompt = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]]
        ids = rollout.ids_BT[row][rollout.real_BT[row]]
        logits = policy.causal_lm(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        expected = law_logps(logits, law).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(rollout.sampler_logps_BT[row, : len(ids)], expected, rtol=0, atol=1e-5)
