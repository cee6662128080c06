"""Tiny random models of many architectures, by the names that transformers gives them."""

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False}  # fmt: skip
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
ATTENTION = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0,
                         "final_logit_softcapping": 2.0},
    "gemma3_text": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {},
    "mistral": {"sliding_window": 4},
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "gpt_oss": SLIDING | EXPERTS | {"head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1},
    "granite": {"logits_scaling": 0.5, "residual_multiplier": 0.5, "embedding_multiplier": 2.0,
                "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 2.0},
    "cohere2": SLIDING | {"logit_scale": 2.0},
    "olmo2": {},
    "smollm3": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}  # fmt: skip
RECURRENT = {
    "mamba": {"state_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 32},
    "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "qwen3_next": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
                   "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                   "shared_expert_intermediate_size": 12},
    "qwen3_5_text": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                     "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip
RECURRENT = {name: sizes for name, sizes in RECURRENT.items() if name in CONFIG_MAPPING}  # of this transformers


def build(name, seed):
    """A model whose greedy completions are not all alike."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(SIZES | (ATTENTION | RECURRENT).get(name, {})))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # what is initialised to zero or one would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model
