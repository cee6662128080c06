"""The packed layers of Llama against Hugging Face's, in float64; which bodies take them, and what becomes of others."""

import copy
import logging

import peft
import pytest
import torch
import transformers
import wide_norm
from references import padded, rollout_from
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_opd.models import LanguageModel, layer_parts
from lit_opd.models import llama as under_test
from lit_opd.models.dropout import compute_layers_twice, set_dropout
from lit_opd.models.forward import LlamaForward, PackedForward, PaddedForward
from lit_opd.models.llama import LayerProducts, llama_hidden, rms_norm, unlike_llama
from lit_opd.models.packed_attention import NAME
from lit_opd.models.packing import pack
from lit_opd.types import SamplingLaw

DOUBLE = torch.float64
SIZES = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
LIKE_LLAMA = {
    "Llama": ("Llama", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama with another activation": ("Llama", {"hidden_act": "gelu"}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama, stretched": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Mistral": ("Mistral", {"sliding_window": None, "head_dim": 4}),
    "windows": ("Mistral", {"sliding_window": 4}),
    "windows in some layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}
SHARED = [5] * 17
# Ragged; a beginning that all but one share, one that ends another, a row twice.
ROWS = [[*SHARED, 3, 4, 6, 7], [*SHARED, 3, 8], [*SHARED[:4], 9, 10], [11, 12], [*SHARED, 3, 8], [*SHARED, 3]]
UNLIKE = {
    "Gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, "its layers are not built like Llama's"),
    "windows of a code that is not known": ("Llama", {"sliding_window": 4}, "its attention has windows"),
    "queries that positions scale": ("Ministral3", {}, "its queries are scaled where they stand late"),
    "GPTNeoX": ("GPTNeoX", {}, "its body is not built like Llama's"),
    "GPT2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, "its body is not built like Llama's"),
    "dynamic rotations": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                          "its positions are not rotations like Llama's"),
    "norms after": ("Olmo2", {}, "its layers are not built like Llama's"),
    "one projection": ("Phi3", {}, "its layers are not built like Llama's"),
    "another MLP": ("Starcoder2", {}, "its layers have another MLP"),
    "experts": ("Qwen3Moe", {"num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1},
                "its layers have another MLP"),
    "norms of Gemma": ("Gemma", {"head_dim": 8}, "its norms are not built like Llama's"),
    "norms without weights": ("Olmo", {}, "its norms are not built like Llama's"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def norms_that_keep_float64(monkeypatch):
    for norm in (Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm, GraniteRMSNorm):
        monkeypatch.setattr(norm, "forward", wide_norm._forward)


def make(name, dtype=DOUBLE, **config):
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**(SIZES | config))
    model = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(made).eval()
    with torch.no_grad():  # biases and norms begin at zero and one, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def row_by_row(body, rows):
    return [body(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]


def gradients(body, hidden):
    """Of every parameter, for a fixed random direction of each row's hidden states."""
    generator = torch.Generator().manual_seed(1)
    total = sum((h * torch.randn(h.shape, generator=generator, dtype=h.dtype)).sum() for h in hidden)
    return torch.autograd.grad(total, [p for p in body.parameters() if p.requires_grad])


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Long enough for the layout to be filled up.
LONG = [[3] * 60 + [row] * 64 for row in range(4, 12)]


@pytest.mark.parametrize("rows", [ROWS, LONG], ids=["short", "long"])
@pytest.mark.parametrize("case", LIKE_LLAMA)
def test_hidden_states_and_gradients_are_those_of_hugging_face(case, rows):
    name, config = LIKE_LLAMA[case]
    body = make(name, **(config | {"max_position_embeddings": 128})).model
    assert unlike_llama(body) is None
    layout, paths = pack(rows, torch.device("cpu"))
    packed = llama_hidden(body, layout, DOUBLE)
    found, expected = [packed[path] for path in paths], row_by_row(body, rows)
    for one, two in zip(found, expected, strict=True):
        close(one, two, 1e-9)
    for one, two in zip(gradients(body, found), gradients(body, expected), strict=True):
        assert two.any()
        close(one, two, 1e-9 * max(1, two.abs().max().item()))
    with torch.no_grad():
        close(llama_hidden(body, layout, DOUBLE), packed, 1e-12)


def test_attention_drops_in_train_mode_only():
    body = make("Llama", attention_dropout=0.5).model
    layout, _ = pack(ROWS, torch.device("cpu"))
    still = llama_hidden(body, layout, DOUBLE)
    assert torch.equal(still, llama_hidden(body, layout, DOUBLE))
    body.train()
    assert ((llama_hidden(body, layout, DOUBLE) - still).abs() > 1e-3).any()


def test_a_norm_is_that_of_hugging_face_and_passes_gradcheck():
    norm = LlamaRMSNorm(6, eps=0.1).to(DOUBLE)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    close(rms_norm(x, norm, DOUBLE), norm(x), 1e-12)
    with torch.no_grad():
        close(rms_norm(x, norm, DOUBLE), norm(x), 1e-12)

    def normed(x, weight):
        holder = copy.copy(norm)
        holder._parameters = {"weight": weight}
        return rms_norm(x, holder, DOUBLE)

    assert torch.autograd.gradcheck(normed, (x, norm.weight))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    pairs = (torch.autograd.grad(y, [x, norm.weight], upstream) for y in (rms_norm(x, norm, DOUBLE), norm(x)))
    for one, two in zip(*pairs, strict=True):
        close(one, two, 1e-12)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_norm_is_computed_in_fp32_and_returned_in_the_dtype_asked_for(stream, weight):
    norm = LlamaRMSNorm(64).to(weight)
    x = (3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))).to(stream)
    found = rms_norm(x, norm, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    difference = (found != norm(x).to(torch.bfloat16)).float().mean()
    assert difference < 0.002, "a sum in another order may move a rare last bit, no more"


def test_a_frozen_norm_has_no_gradient_and_passes_that_of_its_input():
    norm = LlamaRMSNorm(6).to(DOUBLE).requires_grad_(False)
    x = torch.randn(2, 6, dtype=DOUBLE, requires_grad=True)
    rms_norm(x, norm, DOUBLE).pow(3).sum().backward()
    (expected,) = torch.autograd.grad(norm(x).pow(3).sum(), x)
    close(x.grad, expected, 1e-12)
    assert norm.weight.grad is None


def test_the_gated_activation_passes_gradcheck_and_is_that_of_hugging_face():
    gate, up = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    assert torch.autograd.gradcheck(layer_parts._GatedSilu.apply, (gate.requires_grad_(), up.requires_grad_()))
    layer, x = make("Llama").model.layers[0], torch.randn(4, 16, dtype=DOUBLE)
    products = LayerProducts.of(layer)
    close(products.down(layer_parts._GatedSilu.apply(*products.gate_up(x))), layer.mlp(x), 1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_cast_product_is_that_of_cast_weights(bias):
    """Weights are rounded to the dtype of x; their gradients come back in their own."""
    layer = torch.nn.Linear(8, 5, bias=bias)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    upstream = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaves = [x, *layer.parameters()]
    found = under_test._of(layer, x)
    assert type(found.grad_fn).__name__ == "_CastLinearBackward"
    expected = torch.nn.functional.linear(x, *(p.bfloat16() for p in layer.parameters()))
    assert torch.equal(found, expected)
    for one, two in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, expected)), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0.02, atol=0.05)


def test_a_cast_product_passes_gradcheck():
    """From fp32 weights to a float64 input, so that differences can be taken."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE, requires_grad=True)
    weight, bias = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: under_test._CastLinear.apply(x, weight.detach(), bias.detach()), x)
    found = under_test._CastLinear.apply(x, weight, bias).pow(2).sum()
    expected = torch.nn.functional.linear(x, weight.double(), bias.double()).pow(2).sum()
    for one, two in zip(*(torch.autograd.grad(y, [x, weight, bias]) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, two)


def test_a_product_that_somebody_listens_to_calls_its_module():
    layer, heard = torch.nn.Linear(3, 2), []
    layer.register_forward_hook(lambda *_: heard.append(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert under_test._of(layer, torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert heard == [1]


@pytest.mark.parametrize("case", UNLIKE)
def test_bodies_that_are_built_otherwise_are_told(case):
    name, config, reason = UNLIKE[case]
    assert unlike_llama(make(name, torch.float32, **config).base_model) == reason


@pytest.mark.parametrize("part", ["norm", "layers.0", "layers.1.mlp", "layers.0.self_attn", "layers.1.input_layernorm",
                                  "layers.0.self_attn.q_norm", "layers.0.mlp.act_fn"])  # fmt: skip
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_body_with_a_hook_runs_itself(part, kind):
    body, heard = make("Qwen3", head_dim=8).model, []
    handle = getattr(body.get_submodule(part), kind)(lambda *_: heard.append(part))
    policy = LanguageModel(body_of(body), None, "student")
    assert unlike_llama(body) == "it has hooks"
    layout, paths = pack(ROWS, torch.device("cpu"))
    found = policy.forward.packed(policy, layout)
    assert heard, "the hook was never called"
    for one, two in zip([found[path] for path in paths], row_by_row(body, ROWS), strict=True):
        close(one, two, 1e-6)  # Hugging Face's own attention
    handle.remove()
    assert unlike_llama(body) is None


def body_of(body):
    """A causal language model around a body that was changed."""
    model = transformers.Qwen3ForCausalLM(body.config).to(body.dtype)
    model.model = body
    return model


class Sharded(torch.Tensor):
    """A stand-in for the tensors in which parallel training keeps its weights."""


def test_sharded_weights_are_told():
    body = make("Llama").model
    weight = body.layers[1].mlp.up_proj.weight
    body.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().as_subclass(Sharded))
    assert unlike_llama(body) == "its weights are sharded"


class Duck:
    """A tokenizer, as far as a model asks for one."""

    eos_token_id, pad_token_id = 2, 0


def make_rollout(holes=True):
    """Two prompts of unequal lengths, three completions; some tokens not counted."""
    prompts = torch.tensor([[4, 5, 6, 7, 8], [4, 5, 6, 7, 8], [0, 0, 9, 4, 5]])
    prompt_mask = torch.tensor([[True] * 5, [True] * 5, [False, False, True, True, True]])
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 0], [9, 2, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
    counted = mask.clone()
    counted[0, 1] = not holes
    zeros, index = torch.zeros(mask.shape), torch.tensor([0, 0, 1])
    return rollout_from(prompts, prompt_mask, ids, mask, counted, zeros, torch.zeros_like(index), SamplingLaw(), index)


def test_a_lora_student_trains_its_adapters_through_packed_rows():
    model = lora(make("Llama"))
    policy = LanguageModel(model, Duck, "student")
    assert not isinstance(policy.forward, PaddedForward)
    assert isinstance(policy.forward, LlamaForward)
    rollout = make_rollout()
    found, expected = policy.hidden(rollout)[0], padded(policy, rollout)
    close(found, expected, 1e-9)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name for name in trained)
    for one, two in zip(gradients(model, [found]), gradients(model, [expected]), strict=True):
        assert two.any()
        close(one, two, 1e-9 * max(1, two.abs().max().item()))


MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.7}


@pytest.mark.parametrize("multiplier", MULTIPLIED)
def test_a_body_built_like_llama_that_scales_is_found_by_comparison(multiplier):
    neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.5}
    for config, like in ((neutral, True), (neutral | {multiplier: MULTIPLIED[multiplier]}, False)):
        model = make("Granite", **config)
        policy = LanguageModel(model, Duck, "teacher")
        assert unlike_llama(policy.body) is None
        rollout = make_rollout()
        # Scaling attention alone, by `scaling`, is what Llama's layers do, too.
        like = like or multiplier == "attention_multiplier"
        found = policy.hidden(rollout)[0]
        assert isinstance(policy.forward, LlamaForward) == like
        assert not isinstance(policy.forward, PaddedForward), "its attention can be replaced whatever it scales"
        close(found, padded(policy, rollout), 1e-9)


@pytest.mark.parametrize(
    ("name", "config"),
    [("Granite", {"residual_multiplier": 0.9, "attention_multiplier": 0.5}), ("SmolLM3", {"num_hidden_layers": 4})],
)
def test_in_bf16_where_rounding_hides_what_it_does_only_what_is_known_counts_as_llama(name, config):
    policy, rollout = LanguageModel(make(name, torch.bfloat16, **config), Duck, "teacher"), make_rollout()
    assert unlike_llama(policy.body) == "its weights are too coarse to compare it with Llama"
    found, expected = policy.hidden(rollout)[0], padded(policy, rollout)
    assert not isinstance(policy.forward, LlamaForward)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert unlike_llama(LanguageModel(make("Llama", torch.bfloat16), Duck, "teacher").body) is None


def padded_models():
    yield "Lfm2", {"full_attn_idxs": [1]}, "it has layers of type conv"
    yield "Mamba", {"state_size": 4}, "it takes no positions"
    yield "Jamba", {"num_experts": 1, "use_mamba_kernels": False}, "its attention cannot be replaced"


@pytest.mark.parametrize(("name", "config", "reason"), padded_models())
def test_hybrids_run_padded_say_so_once_and_are_right(name, config, reason, caplog):
    model = make(name, torch.float32, **config)
    policy, rollout = LanguageModel(model, Duck, "teacher"), make_rollout()
    with caplog.at_level(logging.WARNING, "lit_opd.models.forward"):
        found = policy.hidden(rollout)[0]
        policy.hidden(rollout)[0]
    assert policy.forward.reason == reason
    expected = f"The teacher ({name}Model) runs padded, and shares no prompts: {reason}."
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lit_opd")] == [expected]
    for row in range(3):  # each alone, without padding
        prompt = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]]
        ids = rollout.ids_BT[row][rollout.real_BT[row]]
        own = model.base_model(input_ids=torch.cat([prompt, ids])[None], use_cache=False).last_hidden_state[0]
        start = int(rollout.mask_BT[:row].sum())
        mine = found[start : start + int(rollout.mask_BT[row].sum())]
        close(mine, own[len(prompt) - 1 : -1][rollout.mask_BT[row][: len(ids)]], 1e-4)


def test_llama_says_nothing(caplog):
    policy = LanguageModel(make("Llama"), Duck, "student")
    with caplog.at_level(logging.WARNING, "lit_opd.models.forward"):
        assert not isinstance(policy.forward, PaddedForward)
    assert not caplog.records


def lora(model):
    """The model with adapters, whose second halves are zero at first, which would hide the first."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return wrapped.to(DOUBLE)


def enable(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def mark(model):
    compute_layers_twice(model)
    set_dropout(model, keep=False)


def kept_bytes(make):
    """Bytes that the backward pass of what is made keeps, each block of memory once, without parameters."""
    sizes = {}

    def keep(x):
        if not isinstance(x, torch.nn.Parameter):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        made = make()
    return made, sum(sizes.values())


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("way", [enable, mark])
@pytest.mark.parametrize(("name", "config", "path"), [("Llama", {}, LlamaForward), ("Qwen3", {}, LlamaForward),
                                                      ("Mistral", {"sliding_window": 4}, LlamaForward),
                                                      ("Olmo3", {"sliding_window": 4}, PackedForward)])  # fmt: skip
def test_layers_computed_twice_run_packed_have_the_same_gradients_and_keep_less(name, config, path, way, adapted):
    model = make(name, num_hidden_layers=4, **config)
    model = (lora(model) if adapted else model).train()
    policy, rollout = LanguageModel(model, Duck, "student"), make_rollout()
    once, bytes_once = kept_bytes(lambda: policy.hidden(rollout)[0])
    calls = []
    for layer in policy.body.layers:
        own = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x, own=own: calls.append(1) or own(x)
    way(model)
    functions = [layer._gradient_checkpointing_func for layer in policy.body.layers]
    assert type(policy.forward) is path
    calls.clear()
    twice, bytes_twice = kept_bytes(lambda: policy.hidden(rollout)[0])
    assert len(calls) == 4
    close(twice, once, 1e-10)
    assert bytes_twice < 0.5 * bytes_once
    for one, two in zip(*(gradients(policy.body, [x]) for x in (once, twice)), strict=True):
        assert one.any()
        close(one, two, 1e-10 * max(1, two.abs().max().item()))
    assert len(calls) == 8
    assert policy.body.config._attn_implementation != NAME, "the body has its own attention back"
    assert [layer._gradient_checkpointing_func for layer in policy.body.layers] == functions


def test_layers_computed_twice_drop_the_same_both_times_where_dropout_is_kept():
    """Against differences, for the mean over many draws would need many."""
    model = make("Llama", attention_dropout=0.5)
    compute_layers_twice(model)
    set_dropout(model, keep=True)
    layout, _ = pack(ROWS, torch.device("cpu"))
    weight = model.model.layers[0].self_attn.v_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def total(step=0.0):
        torch.manual_seed(0)
        with torch.no_grad():
            weight.add_(step * direction)
        found = llama_hidden(model.model, layout, DOUBLE).square().sum()
        with torch.no_grad():
            weight.sub_(step * direction)
        return found

    analytic = (torch.autograd.grad(total(), weight)[0] * direction).sum()
    with torch.no_grad():
        numeric = (total(1e-6) - total(-1e-6)) / 2e-6
    torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=0)


def test_layers_are_computed_once_where_they_are_not_in_training():
    model = make("Llama")
    enable(model)
    policy = LanguageModel(model.eval(), Duck, "student")
    _, kept_marked = kept_bytes(lambda: policy.hidden(make_rollout())[0])
    model.gradient_checkpointing_disable()
    _, kept = kept_bytes(lambda: policy.hidden(make_rollout())[0])
    assert kept_marked == kept


def test_a_body_that_computes_layers_again_by_code_of_its_own_keeps_it():
    model = make("Llama").train()
    model.model.gradient_checkpointing = True
    model.model._gradient_checkpointing_func = None
    policy = LanguageModel(model, Duck, "student")
    assert type(policy.forward) is PackedForward
    assert policy.forward.reason == "its layers are computed again by code of its own"
    close(policy.hidden(make_rollout())[0], padded(policy, make_rollout()), 1e-6)


def test_a_rollout_without_a_counted_token_has_no_hidden_states_and_zero_gradients():
    policy, rollout = LanguageModel(make("Llama"), Duck, "student"), make_rollout()
    found, _ = policy.hidden(rollout.uncount(torch.ones_like(rollout.mask_BT)))
    assert found.shape == (0, 16)
    weights = list(policy.body.parameters())
    assert not any(gradient.any() for gradient in torch.autograd.grad(found.sum(), weights))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_under_bf16_autocast_packed_and_padded_differ_by_rounding_only(name):
    policy, rollout = LanguageModel(make(name, torch.float32), Duck, "student"), make_rollout()
    exact = padded(policy, rollout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, other = policy.hidden(rollout)[0], padded(policy, rollout)
    assert found.dtype == other.dtype
    mine, theirs = ((x - exact).norm() / exact.norm() for x in (found, other))
    assert mine < max(1.5 * theirs.item(), 0.01)
