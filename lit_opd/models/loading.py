"""Load models and tokenizers from folders or a hub.

Errors of other libraries become `UserError`s that name a configuration key, where possible before any weight is read.
`Pair` loads models here. Linter and audit read tokenizers and `config.json`, without the weights.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_opd.config import StudentConfig, TeacherConfig
from lit_opd.errors import UserError
from lit_opd.models.adapters import add_lora, begun_names, make_lora_config, rehearse_lora
from lit_opd.models.dropout import compute_layers_twice
from lit_opd.models.language_model import LanguageModel

__all__ = ["frozen_names", "load_frozen", "load_student", "load_tokenizer", "read_model_config", "refuse_quantised"]

ModelConfig = StudentConfig | TeacherConfig

# bitsandbytes, which peft imports too, asks the hub for a kernel that it can do without, and warns where it gets none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_tokenizer(config: ModelConfig, key: str) -> Any:
    """Load the tokenizer of a model folder or hub name.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    _check_path(config, key)
    try:
        return AutoTokenizer.from_pretrained(config.path, **_source(config))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(f"{key}.path", "a tokenizer", config.path, error) from error


def read_model_config(config: ModelConfig, key: str) -> Any:
    """Read a model's `config.json`, and none of its weights.

    Raises:
        UserError: there is none, or it is not a causal language model's.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _check_path(config, key)
    try:
        found = AutoConfig.from_pretrained(config.path, **_source(config))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(f"{key}.path", "a model folder", config.path, error) from error
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.trust_remote_code:
        raise UserError(f"{key}.path", "a causal language model", f"model_type {found.model_type!r}", "Name another.")
    return found


def load_student(config: StudentConfig, tokenizer: Any = None) -> LanguageModel:
    """Load the student, with trainable weights or, under `lora`, trainable adapters only.

    Raises:
        UserError: the folder cannot be read, or `peft` is missing or refuses the keywords.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config, "student")
    found = read_model_config(config, "student")
    refuse_quantised(found, "student.path")
    lora = None if config.lora is None else make_lora_config(config.lora)
    if lora is not None:  # before weights load: where the adapters sit, and that the output layer has none
        LanguageModel(rehearse_lora(found, lora, config.trust_remote_code), tokenizer, "student")
    model = _load_weights(config, "student", {})
    if lora is not None:
        model = add_lora(model, lora)
    if config.gradient_checkpointing:
        compute_layers_twice(model)
    student = LanguageModel(model, tokenizer, "student")
    student.check_head()
    return student


def load_frozen(config: TeacherConfig, tokenizer: Any = None, key: str = "teacher") -> LanguageModel:
    """Load a frozen model in eval mode, in its own dtype or quantised by bitsandbytes.

    Raises:
        UserError: the folder cannot be read, or bitsandbytes is missing.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config, key)
    extra = {} if config.quantization == "none" else {"quantization_config": _quantization(config, key)}
    read_model_config(config, key)
    model = _load_weights(config, key, extra)
    return LanguageModel(model, tokenizer, key, True, config.temperature, config.offload).freeze()


def frozen_names(model: nn.Module) -> set[str]:
    """List the weights that stay as loading makes them, tied ones under each of their names."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return frozen - begun_names(model)


def refuse_quantised(model_config: Any, key: str) -> None:
    """Refuse a student whose weights are quantised: they take no gradient, and adapters cannot be merged into them.

    Raises:
        UserError: they are.
    """
    quantised = getattr(model_config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        expected = "a student in full precision, whose weights train and take up merged adapters"
        found = f"one quantised by {getattr(method, 'value', method) or 'bitsandbytes'}"
        raise UserError(key, expected, found, "Name the model that was quantised, or save what its dequantize() gives.")


def _check_path(config: ModelConfig, key: str) -> None:
    path = Path(config.path).expanduser()
    looks_local = path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") != 1
    if path.is_dir() and config.gguf_file is None and not (path / "config.json").is_file():
        expected, remedy = "a model folder with a config.json", "Name the folder that save_pretrained wrote."
        raise UserError(f"{key}.path", expected, f"none in {config.path!r}", remedy)
    if config.gguf_file is not None and path.is_dir() and not (path / config.gguf_file).is_file():
        raise UserError(f"{key}.gguf_file", f"a file in {config.path!r}", f"no {config.gguf_file!r}", "Correct it.")
    if looks_local and not path.is_dir():
        raise UserError(f"{key}.path", "a model folder", f"no folder {config.path!r}", "Check the path.")


def _source(config: ModelConfig) -> dict[str, Any]:
    source: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return source | ({"gguf_file": config.gguf_file} if config.gguf_file else {})


def _load_weights(config: ModelConfig, key: str, extra: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=getattr(torch, config.dtype), output_loading_info=True, **_source(config), **extra
        )
    except ImportError as error:
        raise _unreadable(f"{key}.path", "the packages this model needs", "a missing one", error) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(f"{key}.path", "readable weights", config.path, error) from error
    model, found = loaded
    if found["missing_keys"]:  # transformers only warns, and fills them with random numbers
        lacking = f"{config.path!r} without {min(found['missing_keys'])}"
        raise UserError(f"{key}.path", "weights for all that config.json names", lacking, "Correct or replace them.")
    if config.gguf_file is not None:
        # The weights are dense now. What says otherwise keeps a model from moving to a device, and from being saved.
        del model.config.quantization_config
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
    return model


def _quantization(config: TeacherConfig, key: str) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        remedy = 'Run: pip install "lit_opd[quantization]"'
        raise UserError(f"{key}.quantization", "bitsandbytes", "no such package", remedy) from error
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        # bitsandbytes warns at every product of every layer that it computes in fp16, which buries other output.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = getattr(torch, config.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def _unreadable(key: str, expected: str, found: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(key, expected, f"{found!r}: {lines[0]}", "Check the path, and that this machine reaches the hub.")
