"""Norms that keep float64.

Hugging Face's round to fp32 on their way whatever the dtype, so that 1e-8 of noise, which depends on how rows are cut
into batches, would stand between two float64 results. Tests that compare those at 1e-10 need it gone.
"""

import torch
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def _forward(self, hidden_states):
    wide = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * normed.to(hidden_states.dtype)


for norm in (GraniteRMSNorm, LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
    norm.forward = _forward
