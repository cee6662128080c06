"""What layers compute again in the backward pass: the same gradients, and how often and how long it is held."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
import wide_norm  # noqa: F401

from lit_opd.models import llama, recomputed
from lit_opd.models.layer_parts import PLAIN
from lit_opd.models.llama import LayerProducts, llama_hidden, rotation, run_layer
from lit_opd.models.packing import pack
from lit_opd.models.recomputed import made_by

SIZES = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}  # fmt: skip
LEAN = replace(PLAIN, lean=True)
ROWS = [[5] * 17 + [3, 4, 6, 7], [5] * 17 + [3, 8], [11, 12]]


def make(name, **config):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **config))
    return model.double().eval().model


def kept_bytes(run, monkeypatch):
    """Bytes that are kept for the backward pass, whether or not something else may be kept instead of others."""
    found, hooks = {}, torch.autograd.graph.saved_tensors_hooks

    def keep(kept):
        if isinstance(kept, torch.Tensor) and not isinstance(kept, torch.nn.Parameter):
            found[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    with monkeypatch.context() as patch, hooks(keep, lambda tensor: tensor):  # torch calls the innermost hooks alone
        patch.setattr(recomputed, "saved_tensors_hooks", lambda own, unpack: hooks(lambda x: keep(own(x)), unpack))
        made = run()
    return made, sum(found.values())


@pytest.mark.parametrize("case", ["Llama", "Llama, gelu", "Qwen3"])
def test_gradients_of_a_body_are_those_of_layers_that_keep_all(case):
    name, _, activation = case.partition(", ")
    body = make(name, hidden_act=activation or "silu")
    layout, _ = pack(ROWS, torch.device("cpu"))
    along = torch.randn(len(layout.ids_N), 16, dtype=torch.float64)
    both = (llama_hidden(body, layout, torch.float64, parts=parts) for parts in (LEAN, PLAIN))
    found, expected = (torch.autograd.grad((hidden * along).sum(), [*body.parameters()]) for hidden in both)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_layer_whose_attention_keeps_queries_and_keys(name, monkeypatch):
    """As flash attention does. The rotated ones are computed again where norms keep those before."""
    layer, tokens = make(name).layers[0], 50
    body, hidden = make(name), torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    turn = rotation(body, torch.arange(tokens), hidden.detach())

    def attention(query, key, value):
        return query * (key + value).repeat_interleave(2, 1)

    def run(parts):
        return run_layer(layer, LayerProducts.of(layer), hidden, turn, attention, torch.float64, parts)

    (lean, less), (plain, more) = (kept_bytes(partial(run, parts), monkeypatch) for parts in (LEAN, PLAIN))
    sources = [hidden, *layer.parameters()]
    for one, two in zip(*(torch.autograd.grad(x.square().sum(), sources) for x in (lean, plain)), strict=True):
        assert two.any()
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    spared = 2 * 16 + 24 + (4 * 8 + 2 * 8 if name == "Qwen3" else 0)
    assert more - less == 8 * tokens * spared


def test_layers_that_are_computed_twice_as_a_whole_keep_their_inputs_alone(monkeypatch):
    body, (layout, _), asked = make("Qwen3"), pack(ROWS, torch.device("cpu")), []
    own = llama.made_by
    monkeypatch.setattr(llama, "made_by", lambda lean, *rest: asked.append(lean) or own(lean, *rest))
    for layer in body.layers:
        layer.gradient_checkpointing = layer.training = True
    llama_hidden(body, layout, torch.float64, parts=LEAN).sum().backward()
    assert len(asked) == 2 * 2 * 4
    assert not any(asked)


def test_a_tensor_is_computed_once_for_all_its_views_and_not_held():
    calls, held = [], []
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def doubled(x):
        made = x.detach() * 2
        calls.append(1)
        held.append(weakref.ref(made))
        return made

    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with made_by(True, doubled, x) as made:
        total = (made[:, :3] * weight).sum() + (made[1:, 3:] * weight).sum()
    del made
    for rounds in (2, 3):
        total.backward(retain_graph=True)
        gc.collect()
        assert len(calls) == rounds
        assert all(tensor() is None for tensor in held)
    expected = 2 * ((2 * x[:, :3]).sum(0) + (2 * x[1:, 3:]).sum(0))
    torch.testing.assert_close(weight.grad, expected.detach(), rtol=0, atol=1e-12)
