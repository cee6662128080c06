"""Load models and tokenizers from folders or a hub.

Errors of other libraries become `UserError`s that name a configuration key, where possible before any weight is read.
`Pair` loads models here. Linter and audit read tokenizers and `config.json`, without the weights.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_opd.config import StudentConfig, TeacherConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.models.adapters import add_lora, begun_names, make_lora_config, rehearse_lora
from lit_opd.models.dropout import compute_layers_twice
from lit_opd.models.language_model import LanguageModel

__all__ = ["frozen_names", "load_frozen", "load_student", "load_tokenizer", "read_model_config", "refuse_quantised"]

ModelConfig = StudentConfig | TeacherConfig
LAYER = re.compile(r"\d+")

# bitsandbytes, which peft imports too, asks the hub for a kernel that it can do without, and warns where it gets none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_tokenizer(config: ModelConfig, key: str) -> Any:
    """Load the tokenizer of a model folder or hub name.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    _check_path(config, key)
    with _reading(config, key, "a tokenizer"):
        return AutoTokenizer.from_pretrained(config.path, **_source(config))


def read_model_config(config: ModelConfig, key: str) -> Any:
    """Read a model's `config.json`, and none of its weights.

    Raises:
        UserError: there is none, or it is not a causal language model's.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _check_path(config, key)
    with _reading(config, key, "a model folder"):
        found = AutoConfig.from_pretrained(config.path, **_source(config))
    # transformers passes over a damaged one, and its ends are lost.
    if damaged := _damaged(Path(config.path).expanduser(), "generation_config.json"):
        raise UserError(f"{key}.path", "a model folder", f"{config.path!r}: {damaged}", "Correct or replace that file.")
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.trust_remote_code:
        raise UserError(f"{key}.path", "a causal language model", f"model_type {found.model_type!r}", "Name another.")
    if getattr(found.get_text_config(), "num_hidden_layers", 1) < 1:
        raise UserError(f"{key}.path", "a model of at least one layer", "none in config.json", "Correct that file.")
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
    found = read_model_config(config, key)
    if extra and getattr(found, "quantization_config", None):
        expected, given = "none for a model that is quantised already", config.quantization
        raise UserError(f"{key}.quantization", expected, given, "Drop it, or name the model in full precision.")
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
    if (path / "adapter_config.json").is_file():
        raise _adapter(config, key)
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

    keywords = {"output_loading_info": True, "ignore_mismatched_sizes": True, **_source(config), **extra}
    with _reading(config, key, "readable weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(config.path, dtype=getattr(torch, config.dtype), **keywords)
    model, found = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub name, of which nothing was seen before
        raise _adapter(config, key)
    # transformers only warns of both, and fills weights with random numbers.
    absent = [f"{name} of that shape" for name, *_ in found["mismatched_keys"]] + [*found["missing_keys"]]
    if absent:
        lacking = f"{config.path!r} without {min(absent)}"
        raise UserError(f"{key}.path", "weights for all that config.json names", lacking, "Correct or replace them.")
    _check_room(model, found["unexpected_keys"], config, key)
    _check_finite(model, config, key)
    if config.gguf_file is not None:
        # The weights are dense now. What says otherwise keeps a model from moving to a device, and from being saved.
        del model.config.quantization_config
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
    return model


def _check_room(model: Any, surplus: Collection[str], config: ModelConfig, key: str) -> None:
    """Refuse a folder with more layers than its `config.json` names, and tell of other weights that are left out.

    transformers leaves out both without a word: the model would be a part of itself. What else is left out may be
    meant to be, as the vision tower of a model that only writes text here, or layers that predict further tokens.
    """
    known = {LAYER.sub("#", name) for name in model.state_dict()}
    cut_off = [name for name in surplus if LAYER.sub("#", name) in known]
    if cut_off and not getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0):
        found, remedy = f"{config.path!r} with {min(cut_off)} too", "Correct the number of layers in config.json."
        raise UserError(f"{key}.path", "a config.json that names every layer of the weights", found, remedy)
    if surplus:
        told = f"{len(surplus)} tensors of {config.path!r}, {min(surplus)} among them, have no place in this model"
        warnings.warn(f"{key}.path: {told}, and are left out.", LintWarning, stacklevel=4)


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


@contextmanager
def _reading(config: ModelConfig, key: str, expected: str) -> Iterator[None]:
    """Tell in one line what transformers, and what it reads with, cannot read of a model."""
    try:
        yield
    except ImportError as error:
        expected = "a model whose packages are installed"
        raise UserError(f"{key}.path", expected, f"{config.path!r}: {_words(error)}", "Install them.") from error
    except Exception as error:  # transformers, tokenizers and safetensors have no common class for it
        folder = Path(config.path).expanduser()
        local = folder.is_dir()
        where = "" if local else ", no folder here and not to be had from the hub"
        remedy = "Correct or replace its files." if local else "Check the path, and that this machine reaches the hub."
        if "trust_remote_code" in str(error):
            remedy = f"Set {key}.trust_remote_code=true, if you trust the code that lies there."
        found = f"{config.path!r}{where}: {_damaged(folder, '*.json') or _words(error)}"
        raise UserError(f"{key}.path", expected, found, remedy) from error


def _damaged(folder: Path, pattern: str) -> str | None:
    """Name a file of a model folder that is no JSON object, or whose end of a text is no id."""
    for file in sorted(folder.glob(pattern)):
        try:
            ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:  # the last of what is no object
            return f"{file.name} holds no JSON object ({error})"
        if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
            return f"{file.name} names {ends!r} as eos_token_id"
    return None


def _words(error: Exception) -> str:
    """Take the first line of an error, with what follows a colon at its end, and its kind where it is one word."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 1 + len([*takewhile(lambda line: line.endswith(":"), lines)])])[:200]
    return text if " " in text else f"{type(error).__name__}: {text}"


def _adapter(config: ModelConfig, key: str) -> UserError:
    merged = "peft.AutoPeftModelForCausalLM.from_pretrained(PATH).merge_and_unload()"
    remedy = f"Merge it into the model it belongs to, and save that: {merged}."
    return UserError(f"{key}.path", "a whole model", f"{config.path!r}, which holds an adapter of one", remedy)


def _check_finite(model: nn.Module, config: ModelConfig, key: str) -> None:
    for name, weight in model.named_parameters():
        wide = weight.is_floating_point() and weight.element_size() > 1  # torch sums no float8
        # The sum first: it makes no copy of the weight.
        if wide and not weight.detach().sum(dtype=torch.float64).isfinite() and not weight.isfinite().all():
            expected, found = f"finite weights in {config.dtype}", f"others in {name} of {config.path!r}"
            remedy = f"Set {key}.dtype=bfloat16." if config.dtype == "float16" else "Replace the damaged files."
            raise UserError(f"{key}.path", expected, found, remedy)
