"""Kernels of a layer's norms, rotation and activation against the plain functions, interpreted, and their choice."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers

from lit_opd.errors import UserError
from lit_opd.models import LanguageModel, fused_parts
from lit_opd.models.fused_parts import FUSED, prove_parts
from lit_opd.models.layer_parts import PLAIN
from lit_opd.models.llama import llama_hidden
from lit_opd.models.packing import pack

pytestmark = pytest.mark.usefixtures("interpreted")

SIZES = {"vocab_size": 30, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip


class Norm(torch.nn.Module):
    def __init__(self, width, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        self.weight = torch.nn.Parameter(torch.randn(width, generator=generator, dtype=torch.float64).to(dtype))
        self.variance_epsilon = 0.1


class Heads(torch.nn.Module):
    """An attention's module, as far as rotation asks for one."""

    def __init__(self, size, normed, dtype):
        super().__init__()
        if normed:
            self.q_norm, self.k_norm = Norm(size, dtype), Norm(size, dtype)
            self.k_norm.weight.data.mul_(-1.3)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare(run, leaves, bound):
    """Outputs and gradients of the kernels are those of plain torch in float64 up to rounding."""

    def results(parts, leaves):
        outputs = run(parts, *leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((out.double() * draw(*out.shape, seed=7, dtype=torch.float64)).sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(total, [x for x in leaves if x.requires_grad])]

    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    found, expected = results(FUSED, leaves), results(PLAIN, wide)
    for one, two in zip(found, expected, strict=True):
        assert two.any()
        assert (one - two).norm() < bound * two.norm()
    return found


ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_norm(stream, weight, monkeypatch):
    from lit_opd.kernels import layer

    monkeypatch.setattr(layer, "_PROGRAMS", 3)  # fewer than rows
    x, w = draw(7, 20, dtype=stream).requires_grad_(), Norm(20, weight).weight
    dtype = torch.float32 if stream == weight == torch.float32 else torch.bfloat16

    def run(parts, x, weight):
        holder = Norm(20, weight.dtype)
        holder._parameters = {"weight": weight}
        return parts.norm(x, holder, dtype if parts is FUSED else torch.float64)

    found, to_x, to_weight = compare(run, [x, w], ROUNDING[dtype])
    assert (found.dtype, to_x.dtype, to_weight.dtype) == (dtype, stream, weight)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_normed_and_rotated(dtype, normed, monkeypatch):
    from lit_opd.kernels import layer

    monkeypatch.setattr(layer, "_PROGRAMS", 2)
    angles = draw(5, 1, 3, seed=3).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin() * torch.tensor([-1.0] * 3 + [1.0] * 3)
    own = Heads(6, normed, torch.float32)
    weights = [own.q_norm.weight, own.k_norm.weight] if normed else []

    def run(parts, qk, *weights):
        holder = Heads(6, normed, torch.float32)
        for norm, weight in zip(holder.children(), weights, strict=True):
            norm._parameters = {"weight": weight}
        wide = parts is PLAIN
        turn = (cos.double(), sin.double()) if wide else (cos, sin)
        return parts.turned(qk, 3, holder, turn, torch.float64 if wide else dtype)

    query, key, to_qk, *_ = compare(run, [draw(5, 5, 6, dtype=dtype).requires_grad_(), *weights], ROUNDING[dtype])
    assert query.shape == (5, 3, 6)
    assert key.shape == (5, 2, 6)
    assert query.dtype == key.dtype == to_qk.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_activation(dtype, monkeypatch):
    from lit_opd.kernels import layer

    monkeypatch.setattr(layer, "_BLOCK", 64)
    mlp = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).model.layers[0].mlp
    leaves = [3 * draw(5, 31, seed=seed, dtype=dtype) for seed in (1, 2)]
    compare(
        lambda parts, gate, up: parts.activated(gate, up, mlp), [x.requires_grad_() for x in leaves], ROUNDING[dtype]
    )


def make(name="Qwen3", **config):
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**(SIZES | config))
    return LanguageModel(getattr(transformers, f"{name}ForCausalLM")(made), None, "student")


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_passed_runs_by_the_kernels(name, adapted):
    model = make(name)
    if adapted:
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = LanguageModel(peft.get_peft_model(model.model, config), None, "student")
    layout, _ = pack([[1, 2, 3, 4], [1, 2, 5]], torch.device("cpu"))
    weights = [p for p in model.body.parameters() if p.requires_grad]

    def outputs():
        hidden = model.forward.packed(model, layout)
        return [hidden, *torch.autograd.grad((hidden * draw(*hidden.shape)).sum(), weights)]

    expected = outputs()
    verdict = prove_parts(model, 5, "fast")
    assert verdict.off < 1e-5
    assert model.forward.parts is FUSED
    found = outputs()
    names = {type(node).__name__ for node in nodes(found[0].grad_fn)}
    assert {"_NormBackward", "_TurnedBackward"} <= names
    assert not {"_RmsNormBackward", "SiluBackward0"} & names
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() < 1e-5 * two.norm()
    with torch.no_grad():
        torch.testing.assert_close(llama_hidden(model.body, layout, torch.float32, parts=FUSED), expected[0])
    prove_parts(model, 5, "plain")
    assert model.forward.parts is PLAIN


def nodes(function):
    found, todo = set(), [function]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return found


def test_wrong_kernels_are_left(monkeypatch):
    model = make()
    with monkeypatch.context() as patch:
        patch.setattr(fused_parts, "_Turned", fused_parts._Norm)
        verdict = prove_parts(model, 5)
    assert verdict.reason.startswith("on a probe, TypeError")

    def backwards(qk, heads, own, turn, dtype):
        return PLAIN.turned(qk, heads, own, (turn[0], -turn[1]), dtype)

    monkeypatch.setattr(fused_parts, "FUSED", replace(PLAIN, turned=backwards))
    verdict = prove_parts(model, 5)
    assert verdict.off > fused_parts.BOUND
    assert model.forward.parts is PLAIN
    with pytest.raises(UserError, match=r"optim\.paths: expected fused layers to compute what the plain path does"):
        prove_parts(model, 5, "fast")


@pytest.mark.parametrize(("name", "config", "reason"), [
    ("Gemma2", {"query_pre_attn_scalar": 8}, "it is not run by this package's layers"),
    ("Llama", {"hidden_act": "gelu"}, "its activation is not SiLU"),
])  # fmt: skip
def test_what_is_beyond_the_kernels_is_told(name, config, reason):
    assert prove_parts(make(name, **config), 5).reason == reason
    assert fused_parts._beyond(make().model.double().model) == "its weights are float64"


def test_on_a_cpu_nothing_is_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(fused_parts, "_outputs", lambda *args: pytest.fail("the model was run"))
    assert prove_parts(make(), 5).reason == "kernels do not run on cpu"
