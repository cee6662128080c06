"""The kernels of a layer, compiled, at published sizes: against plain torch, and what they cost."""

import pytest
import torch
import transformers

from lit_opd.models import LanguageModel
from lit_opd.models.fused_parts import BOUND, FUSED, _outputs, prove_parts
from lit_opd.models.layer_parts import PLAIN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
LARGE = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}


def make_policy(name, sizes, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=1000, num_hidden_layers=1, head_dim=128, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to("cuda", dtype)
    return LanguageModel(model, None, "student")


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 masters", "bf16"])
def test_a_layer_is_that_of_plain_torch_up_to_rounding(name, sizes, dtype):
    policy = make_policy(name, sizes, dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = _outputs(policy, FUSED, 300)
        plain = _outputs(policy, PLAIN, 300)
    for one, two in zip(found, plain, strict=True):
        assert one.dtype == two.dtype
        assert (one.double() - two.double()).norm() < BOUND * two.double().norm()


def test_what_a_layer_costs():
    policy = make_policy("Qwen3", SMALL, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        verdict = prove_parts(policy, 16384)
    print(f"16,384 tokens, a layer of Qwen3-0.6B without attention, forward and backward: {verdict}")
