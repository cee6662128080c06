"""Attention over a packed layout against a loop over tokens, on all routes."""

import contextlib
import logging
import math

import pytest
import torch
import transformers
from references import padded
from transformers import AttentionInterface

from lit_opd.models import LanguageModel
from lit_opd.models import packed_attention as routes
from lit_opd.models.forward import PackedForward
from lit_opd.models.packed_attention import attend, packed_layers, unsupported
from lit_opd.models.packing import pack
from lit_opd.types import SamplingLaw

SHARED = [3] * 20
SEQUENCES = [[*SHARED, 1, 2, 3, 4], [*SHARED, 1, 2, 5], [*SHARED[:7], 6], [8, 9, 8], [*SHARED, 1, 2, 3, 4]]
SIZE, VALUE_SIZE, SCALE = 6, 4, 0.7


@pytest.fixture(params=["plain", "fused", "expanded"])
def route(request, monkeypatch):
    """Which of the implementations runs; says so if it is another. The last is the one of accelerators."""
    unused, kernel = "scaled_dot_product_attention", routes.scaled_dot_product_attention
    if request.param != "plain":
        monkeypatch.setattr(routes, "_PLAIN_BYTES", 0)
        unused = "_plain"
    if request.param == "expanded":
        monkeypatch.setattr(routes, "_SHARING", set())

    def refuse(*args, **kwargs):
        raise AssertionError(f"{unused} was called")

    def fused(query, key, *others, enable_gqa=False, **kwargs):
        own_keys = query.shape[1] == key.shape[1]
        assert own_keys or request.param == "fused"
        assert enable_gqa == (not own_keys)
        return kernel(query, key, *others, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(routes, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(routes, unused, refuse)
    return request.param


def inputs(heads, groups, dtype=torch.float64, seed=0):
    layout, paths = pack(SEQUENCES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    widths = (heads, SIZE), (groups, SIZE), (groups, VALUE_SIZE)
    shapes = [(len(layout.ids_N), *width) for width in widths]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return layout, paths, [x.requires_grad_() for x in tensors]


def naive(query, key, value, paths, window=None):
    """One token and one head at a time."""
    rows = {path[n]: path[: n + 1] for path in paths for n in range(len(path))}
    repeats = query.shape[1] // key.shape[1]
    found = []
    for token in range(len(query)):
        seen = rows[token] if window is None else rows[token][-window:]
        heads = []
        for head in range(query.shape[1]):
            scores = torch.stack([SCALE * query[token, head] @ key[other, head // repeats] for other in seen])
            weights = (scores - scores.max()).exp()
            heads.append((weights / weights.sum()) @ value[seen, head // repeats])
        found.append(torch.stack(heads))
    return torch.stack(found)


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 22, 100])
def test_attention_and_its_gradients_are_those_of_a_loop(route, heads, groups, window):
    layout, paths, tensors = inputs(heads, groups)
    found, expected = attend(*tensors, layout, SCALE, window), naive(*tensors, paths, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, loop in zip(*(torch.autograd.grad(x, tensors, upstream) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, loop, rtol=0, atol=1e-10)


def test_attention_passes_gradcheck(route):
    layout, _ = pack([[1, 2, 3], [1, 2, 4]], torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    widths = (4, 4), (2, 4), (2, 3)
    tensors = [torch.randn(4, *w, generator=generator, dtype=torch.float64, requires_grad=True) for w in widths]
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, layout, SCALE), tensors)


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_the_mean_over_many_dropouts_is_attention_without(route, dropped):
    layout, _, tensors = inputs(4, 2)
    tensors = [x.detach() for x in tensors]
    expected = attend(*tensors, layout, SCALE)
    torch.manual_seed(0)
    draws = torch.stack([attend(*tensors, layout, SCALE, dropped=dropped) for _ in range(1 + 1500 * (dropped > 0))])
    if not dropped:
        assert torch.equal(draws[0], expected)
        return
    assert draws.std(0).mean() > 0.1, "nothing was dropped"
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws))).clamp(min=1e-12)
    assert error.abs().max() < 5.5
    assert error.square().mean().item() == pytest.approx(1, abs=0.3)


def test_dropped_weights_have_the_gradient_of_what_was_drawn(route):
    """Attention is linear in the values: their gradient and the output must tell of the same draw."""
    layout, _, (query, key, value) = inputs(4, 2)
    upstream = torch.randn(len(query), 4, VALUE_SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.manual_seed(0)
    found = attend(query, key, value, layout, SCALE, dropped=0.5)
    (to_value,) = torch.autograd.grad(found, value, upstream)
    torch.testing.assert_close((to_value * value).sum(), (found * upstream).sum(), rtol=1e-10, atol=0)


def test_layers_that_name_no_scale_get_one_over_the_root_of_their_width():
    layout, paths, tensors = inputs(4, 4)
    as_layers_hand_them = [x.transpose(0, 1)[None] for x in tensors]
    found, _ = AttentionInterface()[routes.NAME](torch.nn.Module(), *as_layers_hand_them, None, layout=layout)
    query, *others = tensors
    torch.testing.assert_close(found[0], naive(query / (SCALE * SIZE**0.5), *others, paths))


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_in_bf16_are_not_rounded_before_the_softmax(autocast):
    """Scores of about a hundred: rounded to bf16, their weights would be off by tens of per cent."""
    layout, paths, tensors = inputs(4, 2, torch.bfloat16)
    large = [12 * tensors[0].detach(), 12 * tensors[1].detach(), tensors[2].detach()]
    leaves = [x.requires_grad_() for x in large]
    exact = [x.detach().double().requires_grad_() for x in large]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = attend(*leaves, layout, SCALE)
    expected = naive(*exact, paths)
    assert found.dtype == torch.bfloat16
    # bf16 keeps eight bits: what goes in and out of the product with the values is rounded, scores are not.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)


def tiny(name, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
    made = getattr(transformers, f"{name}Config")(**(sizes | config))
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


@pytest.mark.parametrize(
    ("name", "config", "keyword"),
    [
        ("Gemma2", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 4}, "softcap"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}, "s_aux"),
    ],
)
def test_softcaps_and_sinks_are_refused_and_those_models_padded(
    name, config, keyword, tiny_tokenizer, make_batch, sample, full_logits, caplog
):
    model = tiny(name, **config)
    policy = LanguageModel(model, tiny_tokenizer, "teacher")
    rollout = sample(model, make_batch(), SamplingLaw())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lit_opd.models.language_model"):
        hidden = policy.hidden(rollout)[0]
        policy.hidden(rollout)[0]
    assert policy.forward.reason == f"its attention has {keyword}"
    expected = f"The teacher ({name}Model) runs padded, and shares no prompts: its attention has {keyword}."
    assert [record.getMessage() for record in caplog.records] == [expected]
    assert torch.equal(hidden, padded(policy, rollout))


def test_windows_of_a_hugging_face_body_are_seen(tiny_tokenizer, make_batch, sample):
    model = tiny("Olmo3", sliding_window=3).double()
    policy = LanguageModel(model, tiny_tokenizer, "student")
    rollout = sample(model, make_batch(), SamplingLaw(), num_completions=2)
    assert type(policy.forward) is PackedForward
    torch.testing.assert_close(policy.hidden(rollout)[0], padded(policy, rollout), rtol=0, atol=1e-6)


def test_a_body_gets_its_own_attention_back(make_model):
    body = make_model(0).model
    own = body.config._attn_implementation
    layout, _ = pack([[1, 2]], torch.device("cpu"))
    inside = []
    with contextlib.suppress(RuntimeError), packed_layers(body, layout):
        inside.append(body.config._attn_implementation)
        raise RuntimeError
    assert inside == [routes.NAME]
    assert body.config._attn_implementation == own


def test_what_configurations_tell_of_attention_that_cannot_be_replaced(make_model):
    assert unsupported(make_model(0).model) is None
    assert unsupported(torch.nn.Linear(1, 1)) == "its attention cannot be replaced"
    body = make_model(0).model
    body.config.layer_types = ["full_attention", "conv"]
    assert unsupported(body) == "it has layers of type conv"
