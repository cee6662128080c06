"""Write a student as a Hugging Face folder, and compare what others will load with what was trained.

Adapters are merged and tied weights are written once, by other libraries and by rules of their own: only the folder
itself shows what became of the student. `runs` calls it when a run ends, and so does the command `export`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_opd.errors import RunError
from lit_opd.functional import head_logits, log_softmax
from lit_opd.models.language_model import LanguageModel

__all__ = ["export_adapter", "export_student"]

_PROBE = 16  # tokens
# Nats that rounding explains. A merged adapter is rounded to the weights' own precision, and a GPU adds in other order.
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
_COARSE = 0.1
_SAFE = "The checkpoint holds the weights; `python -m lit_opd export` writes them again."


def export_student(student: LanguageModel, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write model, tokenizer and generation config, with adapters merged into a copy of the weights.

    Args:
        student: what to write.
        folder: where to.
        dtype: of the written weights, by default those that trained.

    Returns:
        The folder.

    Raises:
        RunError: it cannot be written or loaded, or what it holds is not the student.
    """
    own = student.output_layer.weight.dtype
    written = _merged(student.model) if dtype in (None, own) else copy.deepcopy(_merged(student.model)).to(dtype)
    return _export(student, written, folder, _ROUNDING.get(dtype or own, _COARSE), lambda: _load(student, folder))


def export_adapter(student: LanguageModel, base: LanguageModel, folder: Path) -> Path:
    """Write the adapters of a student alone, for `peft.PeftModel.from_pretrained(base, folder)`, and its tokenizer.

    Args:
        student: a model with adapters.
        base: the model without them, as it is in its own folder. It gets the adapters.
        folder: where to.

    Returns:
        The folder.

    Raises:
        RunError: it cannot be written or loaded, or base and adapters together are not the student.
    """
    from peft import PeftModel

    close = _ROUNDING.get(student.output_layer.weight.dtype, _COARSE)
    return _export(student, student.model, folder, close, lambda: PeftModel.from_pretrained(base.model, folder))


def _export(student: LanguageModel, model: Any, folder: Path, close: float, load: Callable[[], Any]) -> Path:
    try:
        model.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        off = _distance(student, load())
    except Exception as error:  # of transformers, peft, safetensors or the file system
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(f"the export to {str(folder)!r} failed ({reason}). {_SAFE}") from error
    if not off < close:
        raise RunError(f"the export in {str(folder)!r} is not the trained student, but {off:.2g} nats off. {_SAFE}")
    return folder


def _merged(model: Any) -> Any:
    if not hasattr(model, "merge_and_unload"):
        return model
    merged = copy.deepcopy(model).merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        merged.config.tie_word_embeddings = False  # else the trained one of the two would be dropped when loaded
    return merged


def _load(student: LanguageModel, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

    # Not `config.auto_map`: it may name code that was left alone, because transformers has the architecture itself.
    own_code = type(student.causal_lm).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)
    dtype = student.output_layer.weight.dtype
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=own_code)


@torch.no_grad()
def _distance(student: LanguageModel, loaded: Any) -> float:
    """Return how far the log-probabilities of a loaded model are off on the CPU, nats, by the student's own law."""
    size = student.vocabulary
    ids_1L = torch.linspace(0, size - 1, min(_PROBE, size)).long()[None]
    found_LV = log_softmax(loaded.cpu().eval()(input_ids=ids_1L).logits[0, :, :size])
    ids_1L = ids_1L.to(student.device)
    with student.evaluating(), torch.autocast(student.device.type, enabled=False):
        hidden_LH = student.run_body(ids_1L, torch.ones_like(ids_1L, dtype=torch.bool)).last_hidden_state[0]
        own_LV = log_softmax(head_logits(hidden_LH, student.head)).cpu()
    return float((own_LV.exp() * (own_LV - found_LV).abs()).sum(-1).max())
