"""Read linear layers with their LoRA adapters as few large matrices, and leave the layers as they are.

An adapter's product is added to its layer's weight, so that a decoder multiplies once instead of three times. Into a
weight in 16 bits it would not go: what an adapter adds is mostly less than half of the last bit, and the sum would
round to the weight as it was. There the two small matrices stay beside it. `Products` asks at the beginning of a
rollout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.functional.precision import upcast
from lit_opd.models.llama import has_hooks

__all__ = ["adapters_beside", "merged_weight", "plain_layer", "why_not_merged"]


def why_not_merged(layer: nn.Module) -> str | None:
    """Say why a layer cannot be read as a plain linear layer with products added, None where it can."""
    if has_hooks(layer.modules()):
        return "it has hooks"
    # The class itself, for some adapters and quantised layers are subclasses of it.
    if type(plain_layer(layer)) is not nn.Linear:
        return "its projections are not plain linear layers"
    own: Any = layer
    if own is not plain_layer(layer) and own.disable_adapters and own.merged:
        return "its adapters are merged and disabled"  # peft takes them out of the weight at the next forward pass
    if any(name in own.lora_variant for name in _active(own)):
        return "its adapters are more than a product of two matrices"
    if any(own.lora_B[name].bias is not None for name in _active(own)):
        return "its adapters have biases"
    return None


def plain_layer(layer: Any) -> Any:
    """Take the layer that LoRA's adapters sit on, or the layer itself."""
    return layer.base_layer if _has_lora(layer) else layer


def merged_weight(layer: Any) -> Tensor:
    """Take the weight [O, I] of a layer, with the products of its active adapters added where it is wide enough."""
    weight: Tensor = plain_layer(layer).weight.detach()
    for name in () if _is_narrow(layer) else _active(layer):
        weight = weight + layer.get_delta_weight(name).detach()
    return weight


def adapters_beside(layers: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Lay what was not merged of layers that share an input side by side, None where there is nothing.

    Returns:
        Matrices [R, I] and [O, R], all ranks below one another and all outputs, in `dtype`. The second is scaled.
    """
    found = [(layer, name) for layer in layers if _is_narrow(layer) for name in _active(layer)]
    if not found:
        return None
    to_rank_RI = torch.cat([layer.lora_A[name].weight.detach() for layer, name in found])
    blocks = []
    for layer in layers:
        own = [
            upcast(layer.lora_B[name].weight.detach()) * layer.scaling[name]
            if adapted is layer
            else plain_layer(layer).weight.new_zeros(plain_layer(layer).out_features, adapted.lora_B[name].in_features)
            for adapted, name in found
        ]
        blocks.append(torch.cat([block.to(dtype) for block in own], dim=1))
    return to_rank_RI.to(dtype), torch.cat(blocks)


def _active(layer: Any) -> list[str]:
    if not _has_lora(layer) or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_narrow(layer: Any) -> bool:
    return plain_layer(layer).weight.dtype.itemsize < 4


def _has_lora(layer: Any) -> bool:
    # By its name, for peft takes a second to import, and is not there for everybody.
    kind = type(layer)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")
