"""Try every causal language model of transformers, tiny and random: is it sampled and scored right, or refused?

Usage, from the root of the repository: ``python -m tools.census [ARCHITECTURE ...]``. Without names it tries all and
writes the table in docs/architectures.md, to which ``tests/tools/test_census.py`` holds the library.

A model is right where its completions, one and three a prompt, of prompts of unequal lengths in one batch, have the
log-probabilities that a plain forward pass of each row alone gives, both as the engine recorded them and as training
reads them. It is refused where the library says so in one line. All else is wrong.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lit_opd.errors import UserError
from lit_opd.functional import head_logits
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, check_gap, gap_sums, uniforms
from lit_opd.types import PromptBatch, Prompts, Rollout, SamplingLaw

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
VERDICTS = ("right", "refused", "wrong", "not built")
TOLERANCE = 1e-3  # nats; rounding of these sizes gives 1e-5
VOCABULARY, PAD, END = 64, 0, 2

# Sizes by the names that configurations give them. Each architecture gets those that it knows.
SIZES: dict[str, Any] = {
    "attention_window": 8, "chunk_size": 8, "conv_kernel": 4, "d_ff": 24, "d_model": 16, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 24, "decoder_layers": 2, "embedding_size": 16, "encoder_layers": 2, "expand": 2,
    "expert_ffn_hidden_size": 12, "ffn_dim": 24, "first_k_dense_replace": 1, "head_dim": 8, "hidden_size": 16,
    "hidden_size_per_layer_input": 8, "initializer_range": 0.3, "intermediate_size": 24, "kv_lora_rank": 8,
    "linear_head_dim": 8, "linear_key_head_dim": 8, "linear_num_heads": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_value_head_dim": 8, "lru_width": 16, "mamba_d_head": 8, "mamba_d_ssm": 32,
    "mamba_d_state": 4, "mamba_dt_rank": 4, "mamba_expand": 2, "mamba_head_dim": 8, "mamba_n_groups": 1,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "max_position_embeddings": 64, "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12, "moe_topk": 2, "n_embd": 16, "n_group": 1, "n_groups": 1, "n_head": 2,
    "n_inner": 24, "n_layer": 2, "n_positions": 64, "n_routed_experts": 4, "num_attention_heads": 4,
    "num_dense_layers": 1, "num_expert_group": 1, "num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "num_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "num_kv_shared_layers": 0, "num_layers": 2, "num_local_experts": 4, "q_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "query_pre_attn_scalar": 8, "shared_expert_intermediate_size": 12,
    "shared_intermediate_size": 24, "sliding_window": 4, "ssm_state_size": 4, "state_size": 4,
    "tie_word_embeddings": False, "time_step_rank": 4, "topk_group": 1, "v_head_dim": 4, "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY, "word_embed_proj_dim": 16, "bos_token_id": 1, "eos_token_id": END,
    "pad_token_id": PAD,
}  # fmt: skip
# What an architecture needs beside these, where one of its kinds of layers would otherwise be missing.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {"per_layer_config": None},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},  # transformers reads the length off the first
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
}


class Verdict(NamedTuple):
    """What became of an architecture: one of `VERDICTS`, and how it runs or why it does not."""

    word: str
    said: str


def build(kind: str) -> Any:
    """Make a small random model; raise whatever transformers raises where these sizes do not fit it."""
    default = AutoConfig.for_model(kind).to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in default} | _layers(default)
    if default.get("num_attention_heads") == default.get("num_key_value_heads"):
        sizes["num_key_value_heads"] = 4
    if "qk_rope_head_dim" in default:  # of latent attention, where the rotated part is the head that keys share
        sizes |= {"head_dim": 4, "num_key_value_heads": 4}
    sizes |= OWN.get(kind, {})
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > 3e6:
        raise ValueError(f"{count / 1e6:.0f} million weights with the sizes of this table")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # what begins as zero or one would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    model(torch.tensor([[5, 6, 7]]))
    return model


def _layers(default: Mapping[str, Any]) -> dict[str, list[str]]:
    """Choose two layers, of different kinds where there are any."""
    found = {}
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = list(dict.fromkeys(default.get(key) or ()))
        linear = [kind for kind in kinds if "attention" not in kind or "linear" in kind]
        attends = [kind for kind in kinds if kind not in linear]
        if kinds:
            found[key] = ([*linear[:1], *attends[:1]] if linear and attends else kinds * 2)[:2]
    return found


def try_out(kind: str) -> Verdict:
    """Build an architecture, sample from it and score what it wrote."""
    try:
        model = build(kind)
    except Exception as error:  # every configuration of transformers has its own way to refuse sizes
        return Verdict("not built", _line(error))
    try:
        policy = LanguageModel(model, _Tokenizer(), "student")
        policy.check_head()
        off = max(max(gaps(policy, count)) for count in (1, 3))
        return Verdict("right" if off < TOLERANCE else "wrong", f"{type(policy.forward).__name__}, {off:.0e}")
    except UserError as error:
        return Verdict("refused", _line(error.found))
    except Exception as error:  # the verdict that no architecture may get
        return Verdict("wrong", _line(error))


class _Tokenizer:
    """The special tokens that a model is sampled with, for no text is read here."""

    eos_token_id, pad_token_id = END, PAD


def gaps(policy: LanguageModel, count: int) -> tuple[float, float]:
    """Measure how far recorded and trained log-probabilities are at most from those of each row alone, in nats."""
    rows = [list(range(3, 3 + length)) for length in (3, 8, 4, 11, 6)]
    width = max(map(len, rows))
    real_BP = torch.tensor([[column >= width - len(row) for column in range(width)] for row in rows])
    ids_BP = torch.full(real_BP.shape, PAD).masked_scatter(real_BP, torch.tensor(sum(rows, [])))
    batch = PromptBatch(Prompts(ids_BP, real_BP), [{} for _ in rows], 0, list(range(len(rows))))
    numbers_BT = uniforms((0, 0), batch.draws, count, 10)
    engine = LocalEngine()
    rollout = engine.sample(policy, batch, SamplingLaw(), count, numbers_BT)
    check_gap(policy, engine, **{name: float(value) for name, value in gap_sums(policy, rollout, 64).items()})
    with torch.no_grad():
        logits_NV = head_logits(*policy.hidden(rollout))
    trained_N = logits_NV.log_softmax(-1).gather(-1, rollout.ids_BT[rollout.mask_BT][:, None])[:, 0]
    alone_N = torch.cat(list(_alone(policy, rollout)))
    recorded_N = rollout.sampler_logps_BT[rollout.mask_BT]
    return float((recorded_N - alone_N).abs().max()), float((trained_N - alone_N).abs().max())


@torch.no_grad()
def _alone(policy: LanguageModel, rollout: Rollout) -> Iterator[Tensor]:
    for row in range(len(rollout)):
        prompt_P = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]]
        ids_T = rollout.ids_BT[row][rollout.real_BT[row]]
        logits_LV = policy.causal_lm(input_ids=torch.cat([prompt_P, ids_T])[None]).logits[0]
        yield logits_LV[len(prompt_P) - 1 : -1].log_softmax(-1).gather(-1, ids_T[:, None])[:, 0]


def _line(what: object) -> str:
    return re.sub(r"\s+", " ", str(what)).replace("|", "/")[:120]


def page(found: Mapping[str, Verdict]) -> str:
    """Write the page of verdicts."""
    counts = {word: sum(verdict.word == word for verdict in found.values()) for word in VERDICTS}
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    rows = [f"| `{kind}` | {verdict.word} | {verdict.said} |" for kind, verdict in found.items()]
    return "\n".join([
        "# Architectures", "",
        "Every causal language model of transformers, tiny, random and in fp32, was sampled with one and with three",
        "completions a prompt, and scored as training does it. **Right**: all log-probabilities are those of a plain",
        f"forward pass of each row alone, to {TOLERANCE:g} nats; beside it stand how the body runs (built like Llama,",
        "packed or padded) and the largest gap. **Refused**: one line before the first update says why. **Not built**:",
        "the small sizes of `tools/census.py` do not fit it, which says nothing about the library.", "",
        f"transformers {transformers.__version__}: {said}. Written by `python -m tools.census`.", "",
        "| architecture | verdict | how, or why |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


def main() -> None:
    """Try the named architectures, or all and write the page."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    found = {}
    for kind in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[kind] = try_out(kind)
        print(kind, *found[kind], sep="\t", flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
