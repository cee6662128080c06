"""Captured steps on a CUDA device: the tokens of the plain loop, one capture for all rollouts, and no host waits."""

import gc

import peft
import pytest
import torch
import transformers

from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.rollout.graphs import CudaRecorder
from lit_opd.types import PromptBatch, Prompts, SamplingLaw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
ROWS, PROMPT, LENGTH, VOCABULARY = 32, 40, 100, 1000
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64}  # fmt: skip
WINDOW = {"sliding_window": 16}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.05}  # fmt: skip
LAWS = {
    "plain": SamplingLaw(),
    "greedy": SamplingLaw(temperature=0.0),
    "truncated": SamplingLaw(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, min_new_tokens=5),
}


@pytest.fixture(autouse=True)
def full_precision():
    """In fp32 tokens of both loops are equal; TF32 would round them apart."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def make_policy(tiny_tokenizer):
    def make(dtype=torch.float32, name="Qwen3", kind="", **own):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}{kind}Config")(**SIZES, **own)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to("cuda", dtype)
        model.generation_config.eos_token_id = list(range(2, 20))  # rows end at many different steps
        return LanguageModel(model, tiny_tokenizer, "student")

    return make


def make_batch():
    ids_BP = torch.arange(8 * PROMPT, device="cuda").view(8, PROMPT) * 7 % VOCABULARY
    mask_BP = torch.arange(PROMPT, device="cuda") >= torch.arange(8, device="cuda")[:, None]
    return PromptBatch(Prompts(ids_BP, mask_BP), [{}] * 8, 0, list(range(8)))


def run(engine, policy, law=LAWS["plain"], seed=0, length=LENGTH):
    batch = make_batch()
    numbers_BT = uniforms((seed, 0), batch.draws, ROWS // 8, length).cuda()
    return engine.sample(policy, batch, law, ROWS // 8, numbers_BT)


def engine_of(policy):
    engine = LocalEngine()
    assert all(verdict.taken for verdict in engine.prove(policy, ROWS, PROMPT + LENGTH, choice="fast"))
    return engine


def captured(engine, policy):
    return engine._captured[policy.model]


def same(found, expected):
    assert torch.equal(found.ids_BT, expected.ids_BT)
    assert torch.equal(found.real_BT, expected.real_BT)
    torch.testing.assert_close(found.sampler_logps_BT, expected.sampler_logps_BT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize(
    "own",
    [{"name": "Llama"}, {"name": "Qwen2"}, {"name": "Qwen3"}, {"name": "Mistral", **WINDOW},
     {"name": "Qwen3_5", "kind": "Text", **HYBRID}, {"name": "Olmo3", **WINDOW}],
    ids=lambda own: own["name"],
)  # fmt: skip
def test_graphs_write_the_tokens_of_the_plain_loop(own, law, make_policy):
    policy = make_policy(**own)
    engine = engine_of(policy)
    for seed in range(2):
        same(run(engine, policy, law, seed), run(LocalEngine(), policy, law, seed))
    assert policy.model in engine._captured


def test_after_a_step_of_the_optimizer_nothing_is_captured_anew(make_policy):
    policy, law = make_policy(), SamplingLaw(min_new_tokens=LENGTH)  # no row leaves, so that both meet the same sizes
    engine = engine_of(policy)
    run(engine, policy, law)
    captures = captured(engine, policy).captures
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    same(run(engine, policy, law), run(LocalEngine(), policy, law))
    assert captured(engine, policy).captures == captures


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_replayed_step_asks_the_device_nothing(law, make_policy):
    policy = make_policy(torch.bfloat16)
    engine = engine_of(policy)
    run(engine, policy, law, length=8)
    writer = captured(engine, policy)
    captures = writer.captures
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            writer.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert writer.captures == captures


def test_bf16_under_autocast_proves_itself_and_is_faster(make_policy):
    policy = make_policy()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        verdict = LocalEngine().prove(policy, ROWS, PROMPT + LENGTH)[0]
    assert verdict.taken, verdict
    assert verdict.fast_s < verdict.plain_s
    assert verdict.off < 1e-3


def test_adapters_are_merged_into_the_graph(make_policy):
    policy = make_policy()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    policy = LanguageModel(peft.get_peft_model(policy.model, config).cuda().eval(), policy.tokenizer, "student")
    engine = engine_of(policy)
    for _ in range(2):
        same(run(engine, policy), run(LocalEngine(), policy))
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))


def test_a_capture_that_fails_leaves_the_stream_as_it_was():
    x, before = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaRecorder(x.device).capture(lambda: x + x.sum().item())
    assert torch.cuda.current_stream() == before
    assert (x + 1).sum().item() == 6


def test_memory_is_given_back_with_the_model(make_policy):
    policy = make_policy(torch.bfloat16)
    engine = engine_of(policy)
    run(engine, policy)
    before = torch.cuda.memory_allocated()
    cache = sum(tensor.nbytes for tensor in captured(engine, policy)._decoder._caches)
    del policy
    gc.collect()
    assert len(engine._captured) == 0
    assert before - torch.cuda.memory_allocated() > cache
