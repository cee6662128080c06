"""What the layers keep, counted against what autograd saves."""

import gc
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lit_opd.config import StudentConfig
from lit_opd.lab.plan.activations import FLASH, MASKED, PLAIN, Pass, kept
from lit_opd.lab.plan.sizes import sizes_of
from lit_opd.models import flash, layer_parts, llama, load_student, packed_attention, recomputed
from lit_opd.models.dropout import set_dropout
from lit_opd.models.forward import LlamaForward, circumstances
from lit_opd.types import PromptBatch, Prompts, Rollout, SamplingLaw

SHAPE = {"vocab_size": 17, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
PROMPT, LENGTH, PROMPTS = 24, 33, 2


@pytest.fixture(scope="module")
def folder(save_model):
    """Folders of a model of each kind."""
    made = {"llama": LlamaForCausalLM(LlamaConfig(**SHAPE)), "qwen3": Qwen3ForCausalLM(Qwen3Config(**SHAPE))}
    return {kind: save_model(model) for kind, model in made.items()}


def rollout_of(completions):
    """Rows that share nothing but the prompt."""
    rows = PROMPTS * completions
    prompts = Prompts(torch.arange(4, 4 + PROMPTS)[:, None].expand(-1, PROMPT), torch.ones(PROMPTS, PROMPT).bool())
    batch = PromptBatch(prompts, [{}] * PROMPTS, 0, [*range(PROMPTS)])
    ids = torch.arange(4, 4 + rows)[:, None].expand(-1, LENGTH) % 17
    real = torch.ones(rows, LENGTH, dtype=torch.bool)
    stopped = torch.zeros(rows, dtype=torch.bool)
    return Rollout.completed(batch, completions, ids, real, torch.zeros(rows, LENGTH), stopped, SamplingLaw())


def saved_bytes(student, rollout, autocast, monkeypatch):
    """Bytes of all that autograd saves, every storage once, weights left out, and of what computes it again."""
    own, found = {p.untyped_storage().data_ptr() for p in student.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    def inner(own_pack, unpack):  # torch calls the innermost hooks alone
        def both(tensor):
            kept = own_pack(tensor)
            return pack(kept) if isinstance(kept, torch.Tensor) else kept

        return torch.autograd.graph.saved_tensors_hooks(both, unpack)

    def made_by(lean, function, *inputs):
        list(map(pack, (x for x in inputs if lean and isinstance(x, torch.Tensor))))
        return recomputed.made_by(lean, function, *inputs)

    monkeypatch.setattr(recomputed, "saved_tensors_hooks", inner)
    monkeypatch.setattr(llama, "made_by", made_by)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        hidden_NH, _ = student.hidden(rollout)
    assert hidden_NH.requires_grad
    return sum(size for _, size in found.values())


def attend_by_flash(student, monkeypatch):
    """Put a kernel that keeps what flash attention keeps, and computes nothing, in its place."""

    def run(query, key, value, piece, scale):
        rows = query if piece.queries_Q is None else query[piece.queries_Q]
        return torch.zeros_like(rows), torch.zeros(query.shape[1], len(rows))

    monkeypatch.setattr(flash, "_run", run)
    forward = LlamaForward("a test says so", flash.attend_flash)
    student._forwards[circumstances(student.body)] = forward


@pytest.mark.parametrize("attention", [PLAIN, MASKED, FLASH])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("completions", [1, 4])
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}])
@pytest.mark.parametrize(("kind", "lean"), [("llama", False), ("qwen3", False), ("qwen3", True)])
def test_what_a_forward_pass_keeps(kind, lean, lora, completions, dtype, autocast, attention, folder, monkeypatch):
    if attention == FLASH and dtype == "float32" and not autocast:
        pytest.skip("flash attention is for numbers in 16 bits")
    section = StudentConfig(folder[kind], dtype=dtype, lora=lora)
    student, sizes = load_student(section), sizes_of(section, "student")
    assert sizes.unlike is None
    width = {"float32": 4, "bfloat16": 2}[dtype]
    if attention == MASKED:
        monkeypatch.setattr(packed_attention, "_PLAIN_BYTES", 0)
    elif attention == FLASH:
        attend_by_flash(student, monkeypatch)
    work = Pass(
        PROMPTS * completions, PROMPT, LENGTH, completions, width, 2 if autocast else width, attention, False, lean
    )
    rollout = rollout_of(completions)
    student.hidden(rollout)  # the way to run is chosen once
    student.forward.parts = replace(layer_parts.PLAIN, lean=lean)
    found = saved_bytes(student, rollout, autocast, monkeypatch)
    assert kept(sizes, work, recomputed=False) == pytest.approx(found, rel=0.1)


def test_layers_that_are_computed_twice_keep_their_inputs(folder):
    section = StudentConfig(folder["llama"], gradient_checkpointing=True)
    student, rollout, sizes = load_student(section), rollout_of(4), sizes_of(section, "student")
    set_dropout(student.model, keep=False)
    student.hidden(rollout)
    before = {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    hidden_NH, _ = student.hidden(rollout)
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in before]
    inputs = {x.untyped_storage().data_ptr() for x in alive if x.requires_grad and len(x) != len(hidden_NH)}
    work = Pass(PROMPTS * 4, PROMPT, LENGTH, 4, 4, 4, PLAIN, False)
    assert len(inputs) == sizes.layers + 1  # and that of the last norm
    stream = work.tokens * sizes.hidden * 4
    once, twice = (kept(replace(sizes, layers=n), work, recomputed=True) for n in (3, 6))
    assert twice - once == 3 * stream
    assert kept(sizes, work, recomputed=False) - kept(replace(sizes, layers=0), work, recomputed=False) > 3 * 5 * stream
