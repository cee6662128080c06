"""The peak of a plan against what CUDA allocates."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lit_opd.config import load_config
from lit_opd.lab.plan import find_device, make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
ACCELERATOR = "gpu"
PROMPT, LENGTH, PROMPTS, COMPLETIONS = 64, 128, 8, 4
VOCABULARY = 32_000
SHAPES = {"student": (8, 1024, 3072), "teacher": (4, 2048, 6144)}  # layers, width, inner width


@pytest.mark.parametrize("paths", ["plain", "fast"])
@pytest.mark.parametrize("twice", [False, True])
def test_the_peak_of_a_step(twice, paths, make_module, make_data, make_trainer, tmp_path):
    models = {}
    for name, (layers, hidden, inner) in SHAPES.items():
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "head_dim": 128}
        config = Qwen3Config(vocab_size=VOCABULARY, num_attention_heads=16, num_key_value_heads=8, eos_token_id=2,
                             pad_token_id=0, tie_word_embeddings=True, **sizes)  # fmt: skip
        config.save_pretrained(tmp_path / name)
        torch.manual_seed(0)
        models[name] = Qwen3ForCausalLM(config).to(torch.float32 if name == "student" else torch.bfloat16)
    if twice:
        models["student"].gradient_checkpointing_enable()
    rollout = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "num_completions": COMPLETIONS}
    optim = {"name": "AdamW", "lr": 1e-5, "micro_batch_tokens": 4096, "head_chunk_mib": 256, "paths": paths}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    module = make_module(models["student"], models["teacher"], rollout=rollout, optim=optim)
    prompts = [f"{number}{'1' * (PROMPT - 1)}" for number in range(PROMPTS)]
    make_trainer(2, accelerator=ACCELERATOR, precision="bf16-mixed").fit(module, make_data(prompts))
    found = torch.cuda.max_memory_allocated()
    words = [f"{key}.path={tmp_path / key}" for key in SHAPES] + [f"student.gradient_checkpointing={twice}"]
    words += [f"rollout.{key}={value}" for key, value in rollout.items()]
    words += [f"optim.{key}={value}" for key, value in optim.items()]
    words += [f"data.batch_size={PROMPTS}", f"data.max_prompt_tokens={PROMPT}", "trainer.precision=bf16-mixed"]
    plan = make_plan(load_config([], [*words, "evaluation.batch_size=1"]), find_device(None))
    print(f"{paths}, computed twice {twice}: planned {plan.peak / 1e9:.2f} GB, allocated {found / 1e9:.2f}")
    assert plan.peak == pytest.approx(found, rel=0.1)
