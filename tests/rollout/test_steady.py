"""Models that are not built like Llama, decoded by their own code over states that stay, and captured so."""

import pytest
import torch
from architectures import ATTENTION, RECURRENT, build
from rollout.llamas import same
from rollout.tape import TapeRecorder

from lit_opd.errors import UserError
from lit_opd.functional import law_logps
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, captured, uniforms
from lit_opd.rollout.graphs import question
from lit_opd.rollout.steady import SteadyDecoder
from lit_opd.types import SamplingLaw

PLAIN = SamplingLaw()
# Linear attention, convolutions and state spaces; windows, experts, sinks, soft-caps, latent attention.
OWN_CODE = {"qwen3_next", "qwen3_5_text", "lfm2", "mamba", "gemma2", "gpt_oss", "deepseek_v3"}
OWN_CODE &= {*ATTENTION, *RECURRENT}


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


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(OWN_CODE))
def test_captured_rollouts_are_those_of_the_plain_loop_and_of_a_forward_pass(name, make_policy, make_batch):
    """Beyond windows, with rows that leave."""
    policy, batch, law = make_policy(name), make_batch(), SamplingLaw(temperature=0.8)
    engine = captured_engine(policy)
    assert type(engine._captured[policy.model]._decoder) is SteadyDecoder
    rollout = run(engine, policy, batch, law)
    assert policy.model in engine._captured, "a step failed"
    assert engine._captured[policy.model].captures > 2
    same(rollout, run(LocalEngine(), policy, batch, law), atol=1e-5)
    assert len(set(rollout.real_BT.sum(1).tolist())) > 1
    for row in range(0, len(rollout), 3):
        prompt = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]]
        ids = rollout.ids_BT[row][rollout.real_BT[row]]
        logits = policy.causal_lm(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        expected = law_logps(logits, law).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(rollout.sampler_logps_BT[row, : len(ids)], expected, rtol=0, atol=1e-5)


def test_an_update_of_the_weights_counts_and_what_a_rollout_broke_reaches_no_later_one(make_policy, make_batch):
    policy, batch = make_policy("qwen3_5_text"), make_batch()
    engine = captured_engine(policy)
    before = run(engine, policy, batch)
    writer = engine._captured[policy.model]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for states in writer._decoder._states:
        for state in (*states._by_column, *states._numbered.values()):
            state.fill_(torch.nan)
    known = dict(writer._graphs)
    after = run(engine, policy, batch)
    same(after, run(LocalEngine(), policy, batch), atol=1e-5)
    assert engine._captured[policy.model] is writer
    assert all(writer._graphs[key] is graph for key, graph in known.items())
    assert not torch.equal(before.ids_BT[:, :5], after.ids_BT[:, :5])


def test_under_autocast_weights_are_cast_in_the_step(make_policy, make_batch):
    policy, batch = make_policy("qwen3_next"), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = captured_engine(policy)
        assert engine._captured[policy.model].dtype == torch.bfloat16
        found = run(engine, policy, batch)
        assert policy.model in engine._captured
        own = run(LocalEngine(), policy, batch)
    # Rounding sends some rows another way.
    alike = (found.ids_BT[:, :3] == own.ids_BT[:, :3]).all(1)
    assert alike.float().mean() > 0.7
    assert (found.sampler_logps_BT[alike, :3] - own.sampler_logps_BT[alike, :3]).abs().max() < 0.1


REFUSED = {
    "bloom": "its own code fails over states that stay",
    "falcon": r"its step asks the host \(lift_fresh\)",
    "hooks": "it has hooks",
    "rwkv": "RwkvModel, which takes no cache",
    "chunks": "it has layers of type chunked_attention",
    "states": "its cache holds states of its own kind",
    "scale": "its hidden states would be off by",
}


def unsteady(case, make_policy, monkeypatch):
    policy = make_policy(case if case in {*ATTENTION, "rwkv"} else "lfm2")
    if case == "hooks":
        policy.body.layers[0].register_forward_hook(lambda *_: None)
    elif case == "chunks":
        policy.body.config.layer_types = ["conv", "chunked_attention"]
    elif case == "states":
        monkeypatch.setattr("lit_opd.rollout.layer_states._KNOWN", ["DynamicLayer"])
    elif case == "scale":
        monkeypatch.setattr(SteadyDecoder, "_mask", lambda self, seen: None)
    return policy


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_says_why_and_keeps_the_plain_loop(case, make_policy, make_batch, monkeypatch):
    policy = unsteady(case, make_policy, monkeypatch)
    engine = LocalEngine(recorder=TapeRecorder)
    with pytest.raises(UserError, match=REFUSED[case]):
        engine.prove(policy, 4, 32, choice="fast")
    (verdict,) = engine.prove(policy, 4, 32)
    assert not verdict.taken
    assert policy.model not in engine._captured


@pytest.mark.parametrize(
    ("asking", "name"),
    [(lambda x: x.sum().item(), "_local_scalar_dense"), (lambda x: x[x > 0], "index"),
     (lambda x: x.nonzero(), "nonzero"), (lambda x: torch.tensor([1.0]) + x, "lift_fresh"),
     (lambda x: x.to("meta"), "_to_copy"),
     (lambda x: x.index_put_((x > 0,), x[0]), "index_put_"), (lambda x: x[x.long()] * torch.tensor(2.0), None)],
)  # fmt: skip
def test_questions_are_named(asking, name):
    assert question(lambda: asking(torch.ones(3))) == name
