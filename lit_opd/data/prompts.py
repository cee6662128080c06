"""Render rows as text, encode them as token ids, deal with prompts that are too long, and pad.

The data module calls it. No other room knows templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.config import DataConfig
from lit_opd.data.chat import ASSISTANT, apply_chat, check_template_keywords
from lit_opd.errors import UserError

__all__ = ["EncodedPrompts", "encode", "encode_rows", "own_text", "pad_left", "pad_token_id", "render", "show"]

HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class EncodedPrompts:
    """Rows with the token ids of their prompts, and the numbers of prompts that were too long.

    Attributes:
        rows: the rows that were kept.
        ids: the token ids of each row's prompt.
        dropped: how many rows were left out.
        truncated: how many prompts lost their beginning.
        shown: by the name of a scorer, the token ids of what it reads instead of each prompt.
        routes: the weight of each teacher for each row; None where there is one teacher.
    """

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    dropped: int = 0
    truncated: int = 0
    shown: dict[str, list[list[int]]] = field(default_factory=dict)
    routes: list[list[float]] | None = None

    def __len__(self) -> int:
        return len(self.rows)


def render(row: Mapping[str, Any], config: DataConfig, tokenizer: Any) -> str:
    """Write the text that a row's prompt becomes.

    `prompt_template` is formatted with `{prompt}` (the prompt column) and the row's other columns. With `chat`, the
    result is the user's message in the tokenizer's chat template, after `system_prompt` and the worked turns of
    `examples` (each `{"user": ..., "assistant": ...}`). A prompt may also be a list of messages
    `{"role": ..., "content": ...}`, which the template then does not touch; `system_prompt` goes before them unless
    they begin with a system message, and `last_assistant_turn` says what becomes of an answer at their end.

    Raises:
        UserError: the prompt, the template or the tokenizer does not fit `data.chat`.
    """
    for key in ("system_prompt", "examples", "chat_template_kwargs"):
        if (value := getattr(config, key)) and not config.chat:
            remedy = "Set data.chat=true or unset it."
            raise UserError(f"data.{key}", "nothing unless data.chat=true", repr(value), remedy)
    prompt = row[config.prompt_column]
    if isinstance(prompt, str):
        text = _fill(row, config)
        if not config.chat:
            return text
        return apply_chat([*_worked_turns(config), {"role": "user", "content": text}], config, tokenizer)
    messages = _messages(prompt, config)
    if not config.chat:
        raise UserError("data.chat", "true where prompts are lists of messages", "false", "Set data.chat=true.")
    return apply_chat(_open_ended(messages, config), config, tokenizer)


def own_text(row: Mapping[str, Any], config: DataConfig) -> str:
    """Write the text of a row's prompt as it is before the tokenizer's template."""
    prompt = row[config.prompt_column]
    if isinstance(prompt, str):
        return _fill(row, config)
    return "\n".join(message.get("content", "") for message in _messages(prompt, config))


def encode(texts: Sequence[str], config: DataConfig, tokenizer: Any) -> list[list[int]]:
    """Encode rendered prompts.

    A chat template has written the special tokens already, so none are added to it. To plain text the tokenizer adds
    its own, except an end of sequence: the student has to go on from there.
    """
    if not texts:  # Transformers' fast tokenizers refuse an empty list
        return []
    plain = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if config.chat:
        return plain
    special = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    pairs = zip(plain, special, strict=True)
    return [s[:-1] if s[-1:] == [end] and p[-1:] != [end] and len(s) > len(p) else s for p, s in pairs]


def encode_rows(rows: Sequence[dict[str, Any]], config: DataConfig, tokenizer: Any) -> EncodedPrompts:
    """Render and encode rows, and deal with prompts of more than `max_prompt_tokens` tokens as `overlong` says.

    `drop` leaves the row out. `truncate` keeps the END of the prompt, after its first token if that is the beginning
    of sequence; a chat prompt then loses its opening. `error` refuses.

    Raises:
        UserError: a prompt without text, a prompt too long under `error`, or none left under `drop`.
    """
    config.check("data")
    check_template_keywords(config, tokenizer)
    for key, default in (("prompt_template", "{prompt}"), ("examples", [])):
        value = getattr(config, key)
        if value != default and any(isinstance(row[config.prompt_column], list) for row in rows):
            remedy = "Unset it, or write it into the messages."
            raise UserError(f"data.{key}", "its default where prompts are lists of messages", repr(value), remedy)
    texts = [render(row, config, tokenizer) for row in rows]
    for index, text in enumerate(texts):
        if HALF.search(text):  # tokenizers answers with a TypeError
            found = f"half of one, a lone surrogate, in row {index}"
            raise UserError("data.prompt_column", "prompts of whole characters", found, "Correct it in the data.")
    ids = encode(texts, config, tokenizer)
    ignored = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    for index, prompt in enumerate(ids):
        if ignored.issuperset(prompt) or not own_text(rows[index], config).strip():
            expected, remedy = "prompts with text", "Remove it, or begin data.prompt_template with text."
            what = f"nothing but {tokenizer.unk_token!r}" if tokenizer.unk_token_id in prompt else "an empty one"
            raise UserError("data.prompt_column", expected, f"{what} in row {index}", remedy)
    limit = config.max_prompt_tokens
    long = sum(len(prompt) > limit for prompt in ids)
    if config.overlong == "truncate":
        kept = [_end_of(prompt, limit, tokenizer.bos_token_id) for prompt in ids]
        return EncodedPrompts(list(rows), kept, truncated=long)
    if long and (config.overlong == "error" or long == len(ids)):
        found = f"{long} of {len(ids)} longer, the longest with {max(map(len, ids))}"
        remedy = "Raise it, or set data.overlong=truncate to keep the end of long prompts."
        raise UserError("data.max_prompt_tokens", f"prompts of at most {limit} tokens", found, remedy)
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) <= limit]
    return EncodedPrompts([rows[i] for i in fitting], [ids[i] for i in fitting], dropped=long)


def show(
    prompts: EncodedPrompts, shown: Mapping[str, Mapping[str, Any]], config: DataConfig, tokenizer: Any
) -> EncodedPrompts:
    """Add what scorers read instead of the prompts: the same rows, rendered otherwise.

    Args:
        prompts: the rows that were kept.
        shown: by the name of a scorer, values for `prompt_template`, `system_prompt`, `examples` and
            `chat_template_kwargs` of `data`, and `tokenizer`, that of a scorer with another than the student's.
        config: how prompts are rendered otherwise.
        tokenizer: the student's.

    Raises:
        UserError: what `render` refuses, or nothing that could be another where prompts are lists of messages.
    """
    read = {}
    for name, given in shown.items():
        keys, reader = {**given}, given.get("tokenizer", tokenizer)
        keys.pop("tokenizer", None)
        lists = any(isinstance(row[config.prompt_column], list) for row in prompts.rows)
        if keys and lists and not keys.keys() & {"system_prompt", "chat_template_kwargs"}:
            expected = "system_prompt or chat_template_kwargs where prompts are lists of messages"
            raise UserError(f"{name}.reads", expected, ", ".join(keys), "Give one.")
        try:
            own = replace(config, **keys)
            own.check("data")
            if "chat_template_kwargs" in keys:
                check_template_keywords(own, reader)
            texts = [render(row, own, reader) for row in prompts.rows]
        except UserError as error:
            if error.key.removeprefix("data.") not in keys:
                raise
            key = error.key.replace("data.prompt_template", f"{name}.prompt").replace("data.", f"{name}.reads.")
            raise UserError(key, error.expected, error.found, error.remedy) from error
        read[name] = encode(texts, config, reader)
    return replace(prompts, shown=read)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left to one rectangle, ids_BP, with mask_BP True at real tokens."""
    width = max(map(len, prompts), default=0)
    ids_BP = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask_BP = torch.zeros((len(prompts), width), dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids_BP[i, start:] = torch.tensor(prompt, dtype=torch.long)
        mask_BP[i, start:] = True
    return ids_BP, mask_BP


def pad_token_id(tokenizer: Any) -> int:
    """Choose a token to fill padding with. Any will do, as the mask leaves it out."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _fill(row: Mapping[str, Any], config: DataConfig) -> str:
    # Without columns that are null, which would become the word None in a prompt.
    columns = {str(key): value for key, value in row.items() if value is not None}
    try:
        return config.prompt_template.format(**{**columns, "prompt": row[config.prompt_column]})
    except Exception as error:  # the columns are formatted by methods of their own, to any width
        expected = f"only {{prompt}} and columns ({', '.join(columns)}) in braces"
        found = f"{config.prompt_template!r} ({type(error).__name__}: {error})"
        raise UserError("data.prompt_template", expected, found, "Write {{ and }} for braces that are text.") from error


def _messages(prompt: Any, config: DataConfig) -> list[dict[str, Any]]:
    """Take messages with their contents as text, without the empty values that a table gives to absent keys."""
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt)):
        found = f"{type(prompt).__name__} in column {config.prompt_column!r}"
        expected, remedy = "text or a list of {role, content} messages", "Choose another column."
        raise UserError("data.prompt_column", expected, found, remedy)
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    for message in messages:
        if "content" in message or "tool_calls" not in message:
            message["content"] = _content(message.get("content"))
    return messages


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type", "no text") if isinstance(part, Mapping) else type(part).__name__
            expected = "messages whose content is text, or parts {type: text, text: ...}"
            remedy = "Take such messages out, or name another column."
            raise UserError("data.prompt_column", expected, f"a content of {kind!r}", remedy)
    return "".join(part["text"] for part in parts)


def _open_ended(messages: list[dict[str, Any]], config: DataConfig) -> list[dict[str, Any]]:
    """Deal with the assistant's turn at the end of a conversation as `last_assistant_turn` says."""
    kept = list(messages)
    while kept and str(kept[-1]["role"]).lower() in ASSISTANT:
        kept.pop()
    if len(kept) == len(messages) or (kept and config.last_assistant_turn == "continue"):
        return messages
    if config.last_assistant_turn == "refuse" or not kept:
        expected = "conversations that end with the user" if kept else "conversations with a turn of the user"
        found = f"one that ends with the {messages[-1]['role']}: {messages[-1].get('content', '')!r:.60}"
        remedy = "Set it to drop, which takes that turn out, or to continue, which lets the student go on with it."
        raise UserError("data.last_assistant_turn", expected, found, remedy)
    return kept


def _worked_turns(config: DataConfig) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    for example in config.examples:
        if example.keys() != set(roles):
            raise UserError("data.examples", "a list of {user: ..., assistant: ...}", repr(example), "Give both texts.")
    return [{"role": role, "content": example[role]} for example in config.examples for role in roles]


def _end_of(prompt: list[int], limit: int, bos: int | None) -> list[int]:
    if len(prompt) <= limit:
        return prompt
    if prompt[0] == bos and limit > 1:
        return prompt[:1] + prompt[1 - limit :]
    return prompt[-limit:]
