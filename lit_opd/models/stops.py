"""Find the tokens that end a completion, and the one with which a chat template ends a turn.

Sampling stops at any of the former. A demonstration ends with one, which in a chat has to be the latter: a generation
config may name several, of which most end something else. `LanguageModel`, linter and checks ask here.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from lit_opd.config import StudentConfig, TeacherConfig

__all__ = ["end_of_turn", "named_ends", "read_stop_ids"]

_WORDS = "lit-opd-answer"  # that no template writes by itself


def named_ends(sources: Iterable[Any]) -> set[int]:
    """Collect the ids that tokenizers and configurations name as `eos_token_id`, one or several."""
    named = [getattr(source, "eos_token_id", None) for source in sources]
    flat = [i for ids in named for i in (ids if isinstance(ids, list | tuple) else [ids])]
    return {index for index in flat if index is not None}


def read_stop_ids(config: StudentConfig | TeacherConfig, tokenizer: Any, model_config: Any) -> list[int]:
    """Predict `LanguageModel.stop_ids` before the weights are there, from a model's folder."""
    from transformers import GenerationConfig

    sources = [tokenizer, model_config]
    with suppress(OSError):  # most folders have one, none needs it
        sources.append(GenerationConfig.from_pretrained(config.path))
    return sorted(named_ends(sources) & set(tokenizer.get_vocab().values()))


def end_of_turn(tokenizer: Any) -> int | None:
    """Find the special token that the chat template writes after an assistant's words, None where it writes none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _WORDS}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # no template, or one that refuses the conversation in a way of its own
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - {tokenizer.unk_token_id}
    rest = tokenizer(text.rpartition(_WORDS)[2], add_special_tokens=False)["input_ids"] if _WORDS in text else []
    return next((index for index in rest if index in special), None)
