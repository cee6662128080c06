"""Count what a model is made of, from its configuration alone: on torch's meta device no weight takes memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_opd.config import StudentConfig, TeacherConfig
from lit_opd.models import read_model_config
from lit_opd.models.adapters import make_lora_config, rehearse_lora
from lit_opd.models.llama import unlike_llama

__all__ = ["BYTES", "GROUPS", "ModelSizes", "sizes_of"]

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
          "down": ("down_proj",)}  # fmt: skip
"""The projections of a layer that share an input, by a name for the group."""


@dataclass(frozen=True)
class ModelSizes:
    """Hold what decides how much memory a model takes.

    Attributes:
        weights: all of them, tied ones once.
        trainable: those that train; all but for a model with adapters.
        projections: those of the linear layers in the body.
        adapted: those of linear layers with an adapter.
        head: of the output layer, vocabulary x hidden.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: attention heads.
        groups: heads of keys and values.
        head_dim: width of a head.
        inner: width of the MLP.
        adapters: by the group of projections that share an input, how many have an adapter.
        rank: of the adapters, 0 without.
        normed: queries and keys have norms.
        tied: head and embedding are one weight.
        unlike: why the body is none of Llama's kind, None where it is.
    """

    weights: int
    trainable: int
    projections: int
    adapted: int
    head: int
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    inner: int
    adapters: dict[str, int] = field(default_factory=dict)
    rank: int = 0
    normed: bool = False
    tied: bool = False
    unlike: str | None = None

    @property
    def vocabulary(self) -> int:
        """Tokens of the output layer."""
        return self.head // self.hidden

    @property
    def mixed(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values, of a token."""
        return self.groups * self.head_dim


def sizes_of(section: StudentConfig | TeacherConfig, key: str) -> ModelSizes:
    """Count the sizes of a configured model, with its adapters.

    Raises:
        UserError: `config.json` cannot be read, or peft refuses the keywords.
    """
    config = read_model_config(section, key)
    lora = getattr(section, "lora", None)
    adapters = None if lora is None else make_lora_config(lora)
    return _count(config, adapters, section.trust_remote_code)


def _count(config: Any, adapters: Any, trust_remote_code: bool) -> ModelSizes:
    model, text = _on_meta(config, adapters, trust_remote_code), config.get_text_config()
    plain = model.get_base_model() if adapters is not None else model
    body, head = plain.base_model, plain.get_output_embeddings().weight
    linear = {name: part for name, part in body.named_modules() if isinstance(part, nn.Linear)}
    adapted = {name: part for name, part in body.named_modules() if hasattr(part, "base_layer")}
    heads = text.num_attention_heads
    first = [name.rpartition(".")[2] for name in adapted if ".0." in f".{name}."]
    return ModelSizes(
        weights=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        projections=sum(part.weight.numel() for name, part in linear.items() if ".lora_" not in name),
        adapted=sum(part.base_layer.weight.numel() for part in adapted.values()),
        head=head.numel(), layers=text.num_hidden_layers, hidden=head.shape[1], heads=heads,
        groups=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        adapters={group: sum(name in names for name in first) for group, names in GROUPS.items()},
        rank=getattr(adapters, "r", 0),
        normed=any(name.endswith("q_norm") for name, _ in body.named_modules()),
        tied=plain.get_input_embeddings().weight is head, unlike=unlike_llama(body),
    )  # fmt: skip


def _on_meta(config: Any, adapters: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of what is initialised without weights
        if adapters is not None:
            return rehearse_lora(config, adapters, trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
