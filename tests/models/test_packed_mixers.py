"""Hybrids over packed rows: linear attention sees each row whole, the rest of the body shared beginnings once."""

import logging

import pytest
import torch
from architectures import RECURRENT, build

from lit_opd.models import LanguageModel
from lit_opd.models.dropout import compute_layers_twice, set_dropout
from lit_opd.models.forward import PackedForward
from lit_opd.models.packed_mixers import by_rows
from lit_opd.models.packing import pack

HYBRIDS = [name for name in ("qwen3_next", "qwen3_5_text") if name in RECURRENT]
SHARED = [3] * 20
ROWS = [[*SHARED, 4, 5, 6], [*SHARED, 5, 7, 7, 7, 7], [*SHARED, 6, 8, 9, 10, 11], [*SHARED, 4, 5]]
TREES = {
    "a prompt and its completions": ROWS,
    "branches of branches": [[*SHARED, *[4] * 17, 5], [*SHARED, *[4] * 17, 6, 6], [*SHARED, 7], [*SHARED[:7], 8], [9]],
    "a row within another, and twice": [[1, 2, 3], [1, 2], [1, 2, 3]],
    "filler": [[9] * 70 + [row] * 77 for row in range(7)],
}


class Duck:
    """A tokenizer, as far as a model asks for one."""

    eos_token_id, pad_token_id = 2, 0


class Cumulated(torch.nn.Module):
    """A layer whose output is the sum of all tokens so far, each weighted by its place from the end."""

    def forward(self, hidden_states, attention_mask=None):
        assert attention_mask is None
        return hidden_states.cumsum(1).cumsum(1)


@pytest.mark.parametrize("tree", TREES)
def test_a_state_is_that_of_each_row_and_its_gradient(tree):
    layout, paths = pack(TREES[tree], torch.device("cpu"))
    module = Cumulated()
    own = module.forward
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(layout.ids_N), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    with by_rows([module], layout):
        found = module(hidden_states=hidden, layout=layout, attend=None, attention_mask="a mask of packed tokens")
    assert module.forward == own
    assert "forward" not in vars(module)
    # Of a token that several rows share, each row gives the same state.
    expected = torch.zeros_like(found)
    for path in paths:
        expected = expected.index_put((torch.tensor([0]), torch.tensor(path)), own(hidden[:, path])[0])
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    upstream[:, layout.count :] = 0.0
    torch.testing.assert_close(found[:, : layout.count], expected[:, : layout.count])
    one, two = (torch.autograd.grad(x, hidden, upstream)[0] for x in (found, expected))
    torch.testing.assert_close(one, two)


def test_a_module_whose_forward_somebody_replaced_gets_that_one_back():
    module = Cumulated()
    module.forward = replaced = lambda hidden_states: hidden_states
    layout, _ = pack([[1, 2]], torch.device("cpu"))
    with pytest.raises(RuntimeError), by_rows([module], layout):
        raise RuntimeError
    assert module.forward is replaced


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_has_shared_beginnings_once_but_in_linear_attention(name, caplog):
    policy = LanguageModel(build(name, 0), Duck, "student")
    with caplog.at_level(logging.WARNING, "lit_opd.models.forward"):
        assert type(policy.forward) is PackedForward
    assert not [record for record in caplog.records if record.name.startswith("lit_opd")]
    linear, full = policy.body.layers
    seen = []
    for module in (linear.linear_attn.out_proj, linear.mlp, full.self_attn.o_proj, full.mlp):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    layout, paths = pack(ROWS, torch.device("cpu"))
    forward = policy.forward
    seen.clear()
    with torch.no_grad():
        found = forward.packed(policy, layout)
        assert seen == [(3, 25), (1, 33), (1, 33), (1, 33)]
        for row, path in zip(ROWS, paths, strict=True):
            own = policy.body(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(found[path], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_whose_layers_are_computed_twice_has_the_same_gradients(name):
    model, gradients = build(name, 0), []
    policy = LanguageModel(model, Duck, "student")
    layout, _ = pack(ROWS, torch.device("cpu"))
    weights = list(policy.body.parameters())
    for twice in (False, True):
        if twice:
            compute_layers_twice(model)
            set_dropout(model, keep=False)
        found = policy.forward.packed(policy, layout)
        gradients.append(torch.autograd.grad(found.square().sum(), weights, allow_unused=True))
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * one.abs().max().item())
