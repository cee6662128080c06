"""The choice of flash attention: what it is compared on, what is beyond it, and that a run then attends by it."""

import contextlib

import pytest
import torch
import transformers
from flash_on_cpu import emulated
from references import padded, rollout_from

from lit_opd.errors import UserError
from lit_opd.models import LanguageModel, flash, flash_proof
from lit_opd.models.flash import attend_flash
from lit_opd.models.flash_proof import probe_rows, prove_attention
from lit_opd.models.packed_attention import attend
from lit_opd.types import SamplingLaw

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
ROWS = probe_rows(30, prompt=20, completion=6, count=3, tokens=100)


def make(name="Llama", tokenizer=None, **config):
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**(SIZES | config))
    model = getattr(transformers, f"{name}ForCausalLM")(made).double().eval()
    return LanguageModel(model, tokenizer, "student")


@pytest.fixture
def kernel(monkeypatch):
    with emulated(monkeypatch):
        monkeypatch.setattr(flash_proof, "DTYPES", flash.DTYPES)
        yield


def make_rollout():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 30, (2, 20), generator=generator).repeat_interleave(2, 0)
    ids = torch.randint(3, 30, (4, 5), generator=generator)
    real = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    zeros, index = torch.zeros(4, 5), torch.tensor([0, 0, 1, 1])
    whole = torch.ones_like(prompts, dtype=torch.bool)
    return rollout_from(prompts, whole, ids, real, real, zeros, torch.zeros(4), SamplingLaw(), index)


def test_rows_have_the_shapes_of_a_micro_batch():
    rows = probe_rows(1000, prompt=8, completion=5, count=3, tokens=70)
    assert [len(row) for row in rows] == [13] * 5
    beginnings = [tuple(row[:8]) for row in rows]
    assert beginnings[0] == beginnings[1] == beginnings[2] != beginnings[3] == beginnings[4]
    assert len({tuple(row) for row in rows}) == 5
    assert [len(row) for row in probe_rows(9, prompt=60_000, completion=20_000, count=8, tokens=100)] == [16384]


@pytest.mark.parametrize(("name", "config"), [("Llama", {}), ("Mistral", {"sliding_window": 4})])
@pytest.mark.parametrize("twice", [False, True])
def test_a_model_that_passed_attends_by_the_kernel_and_its_copies_do(kernel, monkeypatch, name, config, twice):
    model, rollout = make(name, **config), make_rollout()
    if twice:
        model.model.train().gradient_checkpointing_enable()
    plain = model.hidden(rollout)[0]
    weights = [p for p in model.body.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain.square().sum(), weights)
    verdict = prove_attention(model, ROWS, "fast")
    assert verdict.taken
    assert verdict.off < 1e-12
    assert model.forward.attend is attend_flash

    def refuse(*args):
        raise AssertionError("attention by masks was called")

    monkeypatch.setattr(flash, "attend", refuse)
    found = model.untempered().hidden(rollout)[0]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    for one, two in zip(torch.autograd.grad(found.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, padded(model, rollout), rtol=0, atol=1e-6)


def test_each_kind_of_layer_is_compared(kernel, monkeypatch):
    config = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3}
    model = make("Qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=0, **config)
    seen = []
    monkeypatch.setattr(flash_proof, "attend_flash", lambda *args: seen.append(args[5]) or attend_flash(*args))
    assert prove_attention(model, ROWS, "fast").taken
    assert seen == [None, 4]


def test_a_wrong_kernel_is_left(kernel, monkeypatch):
    model = make()
    monkeypatch.setattr(flash, "_limit", lambda piece: {"window_size_left": 3, "window_size_right": 0})
    verdict = prove_attention(model, ROWS)
    assert not verdict.taken
    assert verdict.off > flash_proof.BOUND
    assert model.forward.attend is attend
    with pytest.raises(UserError, match=r"optim\.paths: expected flash attention to compute what the plain path does"):
        prove_attention(model, ROWS, "fast")


def test_another_proof_takes_the_choice_back(kernel):
    model = make()
    prove_attention(model, ROWS, "fast")
    assert model.forward.attend is attend_flash
    assert str(prove_attention(model, ROWS, "plain")) == "flash attention: the plain path (optim.paths=plain)"
    assert model.forward.attend is attend


def narrow(model):
    flash_proof.DTYPES = (torch.bfloat16,)


BEYOND = {
    "in another precision": ("Llama", {}, narrow, "attention runs in float64"),
    "with dropout": ("Llama", {"attention_dropout": 0.1}, lambda model: model.model.train(), "attention has dropout"),
    "with odd heads": ("Llama", {"head_dim": 12}, None, "its heads are 12 wide, no multiple of 8 up to 256"),
    "padded": ("Mamba", {"state_size": 4}, None, "its rows run padded"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_beyond_the_kernel_is_told(kernel, monkeypatch, case):
    name, config, change, reason = BEYOND[case]
    model = make(name, **config)
    monkeypatch.setattr(flash_proof, "DTYPES", flash_proof.DTYPES)
    if change is not None:
        change(model)
    state = torch.get_rng_state()
    verdict = prove_attention(model, ROWS)
    assert verdict.reason == reason
    assert not verdict.taken
    assert torch.equal(torch.get_rng_state(), state), "a proof that draws would change the run"


def test_values_of_another_width_are_beyond_the_kernel():
    call = flash_proof._Call(*(torch.zeros(1, 1, n, dtype=torch.bfloat16) for n in (16, 16, 8)), 1.0, None, 0.0)
    assert flash_proof._beyond(call) == "its values are 8 wide and its keys 16"


def test_on_a_cpu_there_is_no_kernel_and_nothing_is_run(monkeypatch):
    model = make()
    monkeypatch.setattr(flash_proof, "_calls", lambda *args: pytest.fail("the model was run"))
    assert prove_attention(model, ROWS).reason == "PyTorch has no kernel for it on cpu"
    with contextlib.suppress(UserError):
        prove_attention(model, ROWS, "fast")
        pytest.fail("there is no way back")
