"""The fused decoder against the model's own cache, which rows leave a rollout, and which decoder a model gets."""

import copy
import logging

import peft
import pytest
import torch
from rollout.llamas import MODELS, eager_to_stop, same

from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, uniforms, writing
from lit_opd.rollout.decoders import CacheDecoder
from lit_opd.rollout.fused import FusedDecoder, why_not_fused
from lit_opd.types import SamplingLaw


@torch.no_grad()
def walk(decoder, batch, completions, kept=(4, 0, 3)):
    """Hidden states of the prompts, of three steps of all rows, and of three of those that were kept, reordered."""
    rows = len(batch.prompts.ids_BP) * completions
    states = [decoder.prefill(batch, completions, 6)]
    for t in range(3):
        states.append(decoder.step((torch.arange(rows) * 5 + t) % 17))
    decoder.keep(torch.tensor(kept))
    for t in range(3):
        states.append(decoder.step((torch.arange(len(kept)) + 7 * t) % 17))
    return states


def far(found, expected):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("completions", [1, 3])
@pytest.mark.parametrize("case", MODELS)
def test_hidden_states_are_those_over_the_model_s_own_cache(case, completions, make_policy, make_batch):
    """Prompts of unequal lengths, two of which share a beginning, padded by more than they need."""
    name, config = MODELS[case]
    policy = make_policy(name, **config)
    assert why_not_fused(policy) is None
    batch = make_batch(["1+2=", "7=", "1+2+3=", "12-9+3=", "1+2="], extra_padding=2)
    found, expected = (walk(make(), batch, completions)
                       for make in (lambda: FusedDecoder(policy, 15), lambda: CacheDecoder(policy)))  # fmt: skip
    assert [len(x) for x in found] == [5 * completions] * 4 + [3] * 3
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_in_fp32_both_are_equal_up_to_rounding(make_policy, make_batch):
    policy, batch = make_policy("Llama", torch.float32), make_batch()
    assert far(walk(FusedDecoder(policy, 15), batch, 3), walk(CacheDecoder(policy), batch, 3)) < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_under_bf16_autocast_hidden_states_are_near_those_in_fp32(name, make_policy, make_batch):
    """Two layers of random, large weights: the model's own path under autocast is off by per cents, too."""
    policy, batch = make_policy(name, torch.float32), make_batch()
    exact = walk(FusedDecoder(policy, 15), batch, 3)
    with policy.precision(), torch.autocast("cpu", dtype=torch.bfloat16):
        fused, own = walk(FusedDecoder(policy, 15), batch, 3), walk(CacheDecoder(policy), batch, 3)
    assert 1e-4 < far(fused, exact) < 0.05
    assert far(fused, exact) < 2 * far(own, exact)


def test_weights_in_bf16_decode_in_bf16(make_policy, make_batch):
    policy, batch = make_policy("Llama", torch.bfloat16), make_batch()
    found, own = walk(FusedDecoder(policy, 15), batch, 3), walk(CacheDecoder(policy), batch, 3)
    assert {x.dtype for x in found} == {x.dtype for x in own} == {torch.bfloat16}
    exact = copy.copy(policy)
    exact.body = copy.deepcopy(policy.model).float().model
    assert far(found, walk(CacheDecoder(exact), batch, 3)) < 0.05


def test_a_decoder_starts_anew_with_every_prefill(make_policy, make_batch):
    policy = make_policy("Llama")
    decoder = FusedDecoder(policy, 15)
    walk(decoder, make_batch(), 3)
    for one, two in zip(walk(decoder, make_batch(), 1), walk(FusedDecoder(policy, 5), make_batch(), 1), strict=True):
        assert torch.equal(one, two)


def decoder_of(policy, engine=None):
    with torch.no_grad():  # as `sample` asks
        return type((engine or LocalEngine()).decoder(policy, 4))


@pytest.mark.parametrize("case", MODELS)
def test_the_engine_decodes_what_is_like_llama_by_the_fused_path(case, make_policy):
    name, config = MODELS[case]
    assert decoder_of(make_policy(name, **config)) is FusedDecoder


def with_dora(policy):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"], use_dora=True)
    return LanguageModel(peft.get_peft_model(policy.model, config), policy.tokenizer, "student")


def with_hook(policy):
    policy.body.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return policy


def with_hook_on_a_layer(policy):
    policy.body.layers[1].register_forward_pre_hook(lambda *_: None)
    return policy


def quantised(policy):
    class Quantised(torch.nn.Linear):
        """A stand-in for the layers of quantisation libraries, which are subclasses, too."""

    policy.body.layers[0].self_attn.o_proj.__class__ = Quantised
    return policy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_dora, "its adapters are more than a product of two matrices"),
        (quantised, "its projections are not plain linear layers"),
        (with_hook, "it has hooks"),
        (with_hook_on_a_layer, "it has hooks"),
    ],
)
def test_what_is_not_plain_decodes_over_its_own_cache(change, reason, make_policy, caplog):
    policy = change(make_policy("Llama"))
    assert why_not_fused(policy) == reason
    with caplog.at_level(logging.WARNING, "lit_opd"):
        assert decoder_of(policy) is CacheDecoder
    assert not caplog.records


@pytest.mark.parametrize(("name", "config"), [("Gemma", {"head_dim": 8}), ("Olmo", {}), ("Phi3", {}), ("GPTNeoX", {})])
def test_other_architectures_decode_over_their_own_cache(name, config, make_policy, make_batch):
    policy = make_policy(name, torch.float32, **config)
    assert why_not_fused(policy)
    assert decoder_of(policy) is CacheDecoder
    batch = make_batch()
    LocalEngine().sample(policy, batch, SamplingLaw(), 1, uniforms((0, 0), batch.draws, 1, 4))


def test_a_model_that_scales_where_llama_does_not_is_found_by_comparison_and_told_once(make_policy, caplog):
    policy = make_policy("Granite", residual_multiplier=0.3, attention_multiplier=0.5)
    assert why_not_fused(policy) is None
    engine = LocalEngine()
    with caplog.at_level(logging.WARNING, "lit_opd"):
        assert decoder_of(policy, engine) is CacheDecoder
        assert decoder_of(policy.untempered(), engine) is CacheDecoder
    (record,) = caplog.records
    assert record.getMessage().startswith("The student decodes without the fused path: its hidden states would be off")


PLAIN = SamplingLaw()


class Spying(LocalEngine):
    """Keeps what its decoders were asked to keep; `other` makes other decoders than the engine would."""

    def __init__(self, other=None):
        super().__init__()
        self.other, self.kept, self.stepped = other, [], []

    def decoder(self, policy, rows):
        decoder = self.other(policy) if self.other else super().decoder(policy, rows)
        keep, step = decoder.keep, decoder.step
        decoder.keep = lambda index: self.kept.append(index.tolist()) or keep(index)
        decoder.step = lambda ids: self.stepped.append(len(ids)) or step(ids)
        return decoder


def run(engine, policy, batch, completions=4, length=12, law=PLAIN):
    return engine.sample(policy, batch, law, completions, uniforms((0, 0), batch.draws, completions, length))


@pytest.mark.parametrize("other", [None, CacheDecoder], ids=["fused", "cache"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_rows_that_ended_leave_and_the_others_write_what_they_would_have(
    other, share, make_policy, make_batch, monkeypatch
):
    policy, batch = eager_to_stop(make_policy("Llama")), make_batch()
    monkeypatch.setattr(writing, "_FINISHED_SHARE", 1.1)
    everyone = Spying(other)
    expected = run(everyone, policy, batch)
    assert not everyone.kept
    assert set(everyone.stepped) == {20}
    monkeypatch.setattr(writing, "_FINISHED_SHARE", share)
    engine = Spying(other)
    same(run(engine, policy, batch), expected)
    lengths = expected.real_BT.sum(1)
    active = list(range(20))
    for t, rows in enumerate(engine.stepped, start=1):  # before the t-th step every row has written t tokens or ended
        going = [row for row in active if lengths[row] > t]
        if len(going) <= len(active) * (1 - share) and (share or len(going) < len(active)):
            active = going
        assert rows == len(active)
    assert len(active) < 20, "nobody ever left"


def test_a_rollout_ends_when_all_have(make_policy, make_batch):
    policy, engine = eager_to_stop(make_policy("Llama")), Spying()
    found = run(engine, policy, make_batch(["7="]), completions=2, length=60)
    assert len(engine.stepped) + 1 == found.ids_BT.shape[1] < 60
    assert (found.real_BT.sum(1).amax() == found.ids_BT.shape[1]).all()


@pytest.mark.parametrize("law", [PLAIN, SamplingLaw(temperature=0.7, top_p=0.9, min_new_tokens=3)])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_rollouts_of_both_decoders_are_equal(name, law, make_policy, make_batch):
    policy, batch = eager_to_stop(make_policy(name)), make_batch()
    same(run(LocalEngine(), policy, batch, law=law), run(Spying(CacheDecoder), policy, batch, law=law))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_rollout_after_a_step_of_the_optimizer_uses_the_new_weights(autocast, make_policy, make_batch):
    policy, batch, engine = make_policy("Llama", torch.float32), make_batch(), LocalEngine()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = run(engine, policy, batch)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        after = run(engine, policy, batch)
        fresh = LanguageModel(copy.deepcopy(policy.model), policy.tokenizer, "student")
        expected = run(LocalEngine(), fresh, batch)
    same(after, expected, atol=0)
    width = min(x.sampler_logps_BT.shape[1] for x in (before, after))
    assert not torch.equal(before.ids_BT[:, :width], after.ids_BT[:, :width])


class Elsewhere(str):
    """Names the CPU, and says it is something else."""

    type = "accelerator"


class OnAccelerator(torch.Tensor):
    """A tensor on the CPU whose `device` claims to be an accelerator."""

    device = Elsewhere("cpu")
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_an_accelerator_is_asked_rarely_and_the_rollout_is_the_same(make_policy, make_batch, monkeypatch):
    policy, batch = eager_to_stop(make_policy("Llama")), make_batch()
    expected = run(Spying(), policy, batch)
    monkeypatch.setattr(writing, "_ASK_EVERY", 3)
    engine, numbers = Spying(), uniforms((0, 0), batch.draws, 4, 12)
    same(engine.sample(policy, batch, PLAIN, 4, numbers.as_subclass(OnAccelerator)), expected)
    left = [t for t in range(1, len(engine.stepped)) if engine.stepped[t] < engine.stepped[t - 1]]
    assert left
    assert all(t % 3 == 0 for t in left)
