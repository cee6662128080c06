"""Models built like Llama that the tests of sampling share, and how their rollouts are compared."""

import torch

SIZES = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
MODELS = {
    "Llama": ("Llama", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama with another activation": ("Llama", {"hidden_act": "gelu"}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "Mistral with a window": ("Mistral", {"sliding_window": 5}),
    "Qwen2 with a window in one layer": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3,
                                                   "max_window_layers": 1}),
}  # fmt: skip


def same(one, two, atol=1e-6):
    assert torch.equal(one.ids_BT, two.ids_BT)
    assert torch.equal(one.real_BT, two.real_BT)
    assert torch.equal(one.finish_B, two.finish_B)
    torch.testing.assert_close(one.sampler_logps_BT, two.sampler_logps_BT, rtol=0, atol=atol)


def eager_to_stop(policy):
    """Several stop tokens: most rows end early, at different steps."""
    policy.model.generation_config.eos_token_id = [2, 5, 9, 11]
    return policy
