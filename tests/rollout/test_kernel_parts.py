"""Rollouts whose tokens kernels compute, interpreted, against those of the plain loop."""

import pytest
import torch
from rollout.llamas import same

from lit_opd.errors import UserError
from lit_opd.fast_paths import Verdict
from lit_opd.rollout import LocalEngine, captured, uniforms
from lit_opd.types import SamplingLaw

pytest.importorskip("triton", reason="it needs triton")
pytestmark = pytest.mark.usefixtures("interpreted")

MODELS = {
    "Llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "another activation": ("Llama", {"hidden_act": "gelu"}),
    "norms of queries and keys": ("Qwen3", {"head_dim": 8}),
    "one group and a window": ("Mistral", {"sliding_window": 3, "num_key_value_heads": 1}),
}
LAWS = {
    "plain": SamplingLaw(),
    "temperature, barred stops": SamplingLaw(temperature=0.6, min_new_tokens=3),
    "truncated": SamplingLaw(top_k=5),
    "greedy": SamplingLaw(temperature=0.0),
}


class Repeater:
    """A `Recorder` that runs Python again, for the interpreter of kernels writes past any tape."""

    def __init__(self, device):
        self.made = None

    @staticmethod
    def why_not(device):
        return None

    def warm_up(self, run):
        self.made = run()
        return self.made

    def capture(self, run):
        made = self.made.clone()
        return lambda: made.copy_(run()), made


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one program after the other, 10 ms each."""
    monkeypatch.setattr("lit_opd.kernels.decode_attention._PROGRAMS", 4)
    monkeypatch.setattr(captured, "_PROBED", 2)
    monkeypatch.setattr(captured, "_NARROWEST", 16)


@pytest.fixture(autouse=True)
def even_times(monkeypatch):
    """A probe on a CPU is too short to time, and no verdict here may hang on it."""
    monkeypatch.setattr("lit_opd.fast_paths._seconds", lambda fast, plain, device: (1.0, 1.0))


def write(engine, policy, batch, law):
    return engine.sample(policy, batch.take(torch.tensor([0, 2])), law, 1, uniforms((0, 0), batch.draws[:2], 1, 4))


@pytest.mark.parametrize(("model", "law"), zip(MODELS.values(), LAWS.values(), strict=True), ids=MODELS)
def test_kernels_write_what_the_plain_loop_writes(model, law, make_policy, make_batch):
    policy, batch = make_policy(model[0], dtype=torch.float32, **model[1]), make_batch()
    engine = LocalEngine(recorder=Repeater)
    verdicts = engine.prove(policy, 2, 12, choice="fast")
    assert [verdict.name for verdict in verdicts] == ["captured decoding", "kernels of decoding"]
    assert all(verdict.taken for verdict in verdicts)
    assert 0 < verdicts[1].off < 1e-5  # other arithmetic did run
    same(write(engine, policy, batch, law), write(LocalEngine(), policy, batch, law), 1e-4)


def test_kernels_are_left_where_they_are_unfit_and_captured_steps_stay(make_policy):
    policy = make_policy("Llama")  # in float64
    verdicts = LocalEngine(recorder=Repeater).prove(policy, 2, 12)
    assert verdicts[0].taken
    assert verdicts[1] == Verdict("kernels of decoding", False, "kernels compute in float32")
    with pytest.raises(UserError, match="optim.paths: expected kernels of decoding to.*kernels compute in float32"):
        LocalEngine(recorder=Repeater).prove(policy, 2, 12, choice="fast")


def test_a_kernel_that_is_wrong_is_left(make_policy, monkeypatch):
    from lit_opd.kernels import layer

    gated = layer.gated_silu
    monkeypatch.setattr(layer, "gated_silu", lambda gate, up: 1.5 * gated(gate, up))
    engine, policy = LocalEngine(recorder=Repeater), make_policy("Llama", dtype=torch.float32)
    verdicts = engine.prove(policy, 2, 12)
    assert not verdicts[1].taken
    assert "off by" in verdicts[1].reason
