"""What the layers keep, counted against what autograd saves."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lit_opd.config import StudentConfig
from lit_opd.lab.plan.activations import MASKED, PLAIN, Pass, kept
from lit_opd.lab.plan.sizes import sizes_of
from lit_opd.models import load_student, packed_attention
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


def saved_bytes(student, rollout, autocast):
    """Bytes of all that autograd saves, every storage once, weights left out."""
    own, found = {p.untyped_storage().data_ptr() for p in student.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        hidden_NH, _ = student.hidden(rollout)
    assert hidden_NH.requires_grad
    return sum(size for _, size in found.values())


@pytest.mark.parametrize("attention", [PLAIN, MASKED])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("completions", [1, 4])
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_a_forward_pass_keeps(kind, lora, completions, dtype, autocast, attention, folder, monkeypatch):
    section = StudentConfig(folder[kind], dtype=dtype, lora=lora)
    student, sizes = load_student(section), sizes_of(section, "student")
    assert sizes.unlike is None
    if attention == MASKED:
        monkeypatch.setattr(packed_attention, "_PLAIN_BYTES", 0)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    work = Pass(PROMPTS * completions, PROMPT, LENGTH, completions, width, 2 if autocast else width, attention, False)
    rollout = rollout_of(completions)
    student.hidden(rollout)  # the way to run is chosen once
    found = saved_bytes(student, rollout, autocast)
    assert kept(sizes, work, recomputed=False) == pytest.approx(found, rel=0.1)
