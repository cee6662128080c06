"""Add LoRA adapters to a student, and refuse those that could not be trained, resumed or exported.

peft takes keywords whose adapters cannot be merged, have no exact gradient, or begin from data that it is never given.
`load_student` asks here before it reads a weight, and checkpoints ask what an initialisation changed.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from lit_opd.errors import UserError, suggest

__all__ = ["add_lora", "begun_names", "check_adapters", "make_lora_config", "rehearse_lora"]

KEYWORDS = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out",
)  # fmt: skip
"""Of peft.LoraConfig: what they make trains with exact gradients, and merges into weights that any program loads."""
SAID = {"rank": "r", "lora_rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}  # elsewhere
PLAIN = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the student's weights as they are, and freeze none of the adapter's own."""
CHANGING = ("pissa", "olora", "mica")


def make_lora_config(lora: dict[str, Any]) -> Any:
    """Make peft's configuration of the keywords in `student.lora`.

    Raises:
        UserError: peft is missing, or a keyword or value is unknown or not supported.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("student.lora", "peft", "no such package", 'Run: pip install "lit_opd[lora]"') from error
    defaults = vars(LoraConfig(task_type="CAUSAL_LM"))
    for key, value in lora.items():
        if key not in defaults:
            expected = "a keyword of peft.LoraConfig"
            raise UserError(f"student.lora.{key}", expected, "an unknown one", suggest(SAID.get(key, key), KEYWORDS))
        if key not in KEYWORDS and value != defaults[key]:
            expected = "no such key: its adapters cannot be trained exactly, or not be merged into the exported student"
            raise UserError(f"student.lora.{key}", expected, repr(value), "Leave it out.")
    begin = lora.get("init_lora_weights", True)
    if begin not in (*PLAIN, *CHANGING) and not str(begin).startswith("pissa_niter_"):
        words = ", ".join(map(str, (*PLAIN, *CHANGING, "pissa_niter_16"))).lower()
        remedy = "Choose one of these: others begin from data, from a quantised student, or not as they say."
        raise UserError("student.lora.init_lora_weights", f"one of {words}", repr(begin), remedy)
    try:
        return LoraConfig(**({"task_type": "CAUSAL_LM"} | lora))
    except Exception as error:  # peft has no common class for what it refuses
        raise UserError("student.lora", "keywords that peft accepts", _told(error), "Correct them.") from error


def add_lora(model: Any, config: Any) -> Any:
    """Wrap a model in adapters.

    Raises:
        UserError: peft refuses, or the adapters could not be exported.
    """
    from peft import get_peft_model

    try:
        for pattern in [*(config.modules_to_save or ()), *config.rank_pattern, *config.alpha_pattern]:
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name, _ in model.named_modules()):
                raise ValueError(f"no module is called {pattern!r}")  # which peft passes over without a word
        adapted = get_peft_model(model, config)
    except Exception as error:  # peft has no common class for what it refuses
        raise UserError(
            "student.lora", "adapters that fit the student", _told(error), "Correct its keywords."
        ) from error
    check_adapters(adapted)
    return adapted


def rehearse_lora(model_config: Any, config: Any, trust_remote_code: bool) -> Any:
    """Add the adapters to the same model without its weights, and return it.

    Raises:
        UserError: whatever `add_lora` refuses.
    """
    from transformers import AutoModelForCausalLM

    plain = copy.copy(config)
    plain.init_lora_weights = True  # others decompose the weights, and there are none
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        return add_lora(model, plain)


def check_adapters(model: Any) -> None:
    """Check adapters where they sit.

    Raises:
        UserError: prompts instead of adapters, an adapter on shared weights, or one whose scale is 0 or not finite.
    """
    from peft.tuners.lora import LoraLayer

    for kind in (own.peft_type.value for own in model.peft_config.values() if own.is_prompt_learning):
        raise UserError("student", "adapters in the model's own layers", f"a {kind} adapter beside them", "Use LoRA.")
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if any(shared[id(weight)] > 1 for weight in layer.get_base_layer().parameters()):
            # Merged, it would change the other module too, where the trained model has no adapter.
            expected, found = "adapters on weights that belong to one module", f"one on {name}, whose weights are tied"
            remedy = "Leave that module out of the targets, or name it in student.lora.modules_to_save."
            raise UserError("student.lora", expected, found, remedy)
        if not all(scale and math.isfinite(scale) for scale in layer.scaling.values()):
            expected, found = "adapters with a finite scale other than 0", f"{layer.scaling} at {name}"
            raise UserError("student.lora", expected, found, "Correct lora_alpha, alpha_pattern or r.")


def begun_names(model: nn.Module) -> set[str]:
    """List the weights in adapted layers, where LoRA's initialisation changed some or chose frozen ones, else none."""
    own: dict[str, Any] = getattr(model, "peft_config", {})
    if all(getattr(config, "init_lora_weights", True) in PLAIN for config in own.values()):
        return set()
    from peft.tuners.lora import LoraLayer

    layers = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(layers)}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
