"""Fixtures of the tests of sampling."""

import pytest
import torch
import transformers
import wide_norm
from rollout.llamas import SIZES
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_opd.models import LanguageModel


@pytest.fixture
def make_policy(tiny_tokenizer, monkeypatch):
    """Makes a random model built like Llama, whose norms keep float64."""
    for norm in (Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm, GraniteRMSNorm):
        monkeypatch.setattr(norm, "forward", wide_norm._forward)

    def make(name, dtype=torch.float64, **config):
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}Config")(**(SIZES | config))
        model = getattr(transformers, f"{name}ForCausalLM")(made).eval()
        with torch.no_grad():  # biases and norms begin at zero and one, which would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return LanguageModel(model.to(dtype), tiny_tokenizer, "student")

    return make
