"""Read a linear layer's weight with its LoRA adapters merged, and leave the layer as it is.

A decoder multiplies by the merged weight, one product instead of three. `Products` asks for it at the beginning of a
rollout.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_opd.functional.precision import upcast
from lit_opd.models.llama import has_hooks

__all__ = ["merged_weight", "plain_layer", "why_not_merged"]


def why_not_merged(layer: nn.Module) -> str | None:
    """Say why the weight of a layer cannot be read as that of one plain linear layer, None where it can."""
    if has_hooks(layer.modules()):
        return "it has hooks"
    # The class itself, for some adapters and quantised layers are subclasses of it.
    if type(plain_layer(layer)) is not nn.Linear:
        return "its projections are not plain linear layers"
    if type(layer) is nn.Linear:
        return None
    own: Any = layer
    if own.disable_adapters and own.merged:  # peft takes them out of the weight at the next forward pass
        return "its adapters are merged and disabled"
    if any(name in own.lora_variant for name in _active(own)):
        return "its adapters are more than a product of two matrices"
    if any(own.lora_B[name].bias is not None for name in _active(own)):
        return "its adapters have biases"
    return None


def plain_layer(layer: Any) -> Any:
    """Take the layer that LoRA's adapters sit on, or the layer itself."""
    return layer.base_layer if _has_lora(layer) else layer


def merged_weight(layer: Any) -> Tensor:
    """Add the products of the active adapters to the weight [O, I], in fp32 (float64 stays) where there is one."""
    weight: Tensor = plain_layer(layer).weight.detach()
    for name in _active(layer):
        weight = upcast(weight) + upcast(layer.get_delta_weight(name).detach())
    return weight


def _active(layer: Any) -> list[str]:
    if not _has_lora(layer) or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _has_lora(layer: Any) -> bool:
    # By its names, for peft takes a second to import and is there only where a model has adapters.
    kind = type(layer)
    return kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"
