"""Layers with adapters, read as one matrix or as three, against what the layers compute themselves."""

import copy

import peft
import pytest
import torch
from rollout.llamas import eager_to_stop, same

from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.rollout.decoders import CacheDecoder
from lit_opd.rollout.fused import FusedDecoder, why_not_fused
from lit_opd.rollout.products import Products
from lit_opd.types import SamplingLaw

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "all": {"target_modules": ALL},
    "some": {"target_modules": ["k_proj", "v_proj", "down_proj"]},
    "rank-stabilised": {"target_modules": ALL, "use_rslora": True, "lora_alpha": 3},
    "ranks of their own": {"target_modules": ALL, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"up_proj": 9}},
    "with dropout": {"target_modules": ALL, "lora_dropout": 0.5},
    "with trained copies": {"target_modules": ALL, "modules_to_save": ["lm_head", "input_layernorm", "embed_tokens"]},
}


def adapted(policy, **config):
    torch.manual_seed(1)
    model = peft.get_peft_model(policy.model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3} | config))
    with torch.no_grad():  # adapters begin at zero
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = (parameter + 0.2 * torch.randn_like(parameter)).to(
                    policy.body.embed_tokens.weight.dtype
                )
    return LanguageModel(model.eval(), policy.tokenizer, "student")


def rollout(policy, batch, decoder=None):
    engine = LocalEngine()
    if decoder is not None:
        engine.decoder = lambda policy, rows: decoder(policy)
    return engine.sample(policy, batch, SamplingLaw(), 4, uniforms((0, 0), batch.draws, 4, 12))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_student_with_adapters_writes_what_it_writes_over_its_own_cache(config, make_policy, make_batch):
    bare = make_policy("Qwen2")
    policy, batch = adapted(eager_to_stop(bare), **config), make_batch()
    assert why_not_fused(policy) is None
    with torch.no_grad():
        assert type(LocalEngine().decoder(policy, 20)) is FusedDecoder
    found = rollout(policy, batch)
    same(found, rollout(policy, batch, CacheDecoder))
    with policy.model.disable_adapter():
        without = rollout(policy, batch)
        same(without, rollout(policy, batch, CacheDecoder))
    assert not torch.equal(found.ids_BT[:, :3], without.ids_BT[:, :3])


def test_two_adapters_are_added_and_a_merged_one_is_not_added_twice(make_policy, make_batch):
    policy, batch = adapted(make_policy("Llama"), target_modules=ALL), make_batch()
    torch.manual_seed(2)
    other = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"], init_lora_weights=False)
    policy.model.add_adapter("other", other)
    policy.model.double().base_model.set_adapter(["default", "other"])
    found = rollout(policy, batch)
    same(found, rollout(policy, batch, CacheDecoder))
    policy.model.merge_adapter()
    same(rollout(policy, batch), found)


def test_the_model_stays_as_it_was(make_policy, make_batch):
    policy = adapted(make_policy("Llama"), target_modules=ALL)
    before = copy.deepcopy(policy.model.state_dict())
    rollout(policy, make_batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


@pytest.mark.parametrize("lasting", [False, True])
def test_in_16_bits_an_adapter_smaller_than_the_last_bit_counts(lasting):
    """Weights of 1, whose neighbour in bf16 is 0.0078 away, and an adapter that adds 0.001."""
    layers = [torch.nn.Linear(16, size).bfloat16() for size in (4, 8)]
    config = peft.LoraConfig(r=1, lora_alpha=2, target_modules=["0", "1"])
    inner = torch.nn.Sequential(*layers)
    peft.inject_adapter_in_model(config, inner)
    with torch.no_grad():
        for number, layer in enumerate(inner):
            layer.base_layer.weight.fill_(1.0)
            layer.base_layer.bias.zero_()
            layer.lora_A["default"].weight.copy_(torch.arange(16) % 2)
            layer.lora_B["default"].weight.fill_(0.0005 * (number + 1))
    x = (
        torch.tensor([1.0, -1.0] * 8).bfloat16().expand(3, 16)
    )  # sums to 0 but for the adapter, which adds up -8 of 0.001
    products = Products(torch.bfloat16, 3, lasting)
    product = products.of(list(inner))
    expected = torch.cat([torch.full((3, 4), -0.008), torch.full((3, 8), -0.016)], 1)
    torch.testing.assert_close(product(x).float(), expected, rtol=1e-2, atol=1e-4)
    if lasting:
        with torch.no_grad():
            inner[0].lora_B["default"].weight.mul_(2)
        products.refresh()
        torch.testing.assert_close(product(x)[:, :4].float(), 2 * expected[:, :4], rtol=1e-2, atol=1e-4)


def with_dora(policy):
    return adapted(policy, target_modules=["up_proj"], use_dora=True)


def with_bias(policy):
    return adapted(policy, target_modules=["up_proj"], lora_bias=True)


def with_hook(policy):
    policy = adapted(policy, target_modules=["up_proj"])
    policy.body.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    return policy


def merged_and_disabled(policy):
    policy = adapted(policy, target_modules=["up_proj"])
    policy.model.merge_adapter()
    policy.model.base_model.disable_adapter_layers()
    return policy


def with_another_projection(policy):
    return adapted(policy, target_modules=["up_proj"], modules_to_save=["down_proj"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_dora, "its adapters are more than a product of two matrices"),
        (with_bias, "its adapters have biases"),
        (with_hook, "it has hooks"),
        (merged_and_disabled, "its adapters are merged and disabled"),
        (with_another_projection, "its projections are not plain linear layers"),
    ],
)
def test_what_does_not_merge_decodes_over_its_own_cache(change, reason, make_policy):
    bare = make_policy("Llama", mlp_bias=True)
    policy = change(bare)
    assert why_not_fused(policy) == reason
    with torch.no_grad():
        assert type(LocalEngine().decoder(policy, 4)) is CacheDecoder
