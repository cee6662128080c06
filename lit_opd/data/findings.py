"""Find what is most likely not meant in prompts that can be used all the same.

Why here: nothing of it stops a run, and each of it spoils one without a word. The data module tells the findings
before training, so `fit` and `audit` say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lit_opd.config import DataConfig
from lit_opd.data.prompts import EncodedPrompts, own_text, render

__all__ = ["find_in_prompts"]


def find_in_prompts(train: EncodedPrompts, validation: EncodedPrompts, config: DataConfig, tokenizer: Any) -> list[str]:
    """Look at all prompts, as they lie in the data and as the student gets them.

    Returns:
        One sentence a finding, which begins with the key.
    """
    parts = {"training": train, "validation": validation}
    rows, ids = train.rows + validation.rows, train.ids + validation.ids
    found = [sentence for name, part in parts.items() for sentence in _too_long(name, part, config)]
    found += _overlap(train, validation, config)
    texts = [own_text(row, config) for row in rows]
    found += _rendered_before(texts, config, tokenizer) if config.chat else _begun_twice(ids, tokenizer)
    spelled = sum(text.lstrip().startswith(("[{", "[ {")) and "role" in text for text in texts)
    if spelled:
        found.append(f"data.prompt_column: {spelled} of {len(texts)} prompts are lists of messages that are spelled as "
                     "text, and reach the student so. Give them as lists, in .jsonl or .parquet.")  # fmt: skip
    unknown = tokenizer.unk_token_id
    lost = sum(unknown in prompt for prompt in ids) if unknown not in (None, tokenizer.eos_token_id) else 0
    if lost:
        found.append(f"data.prompt_column: {lost} of {len(ids)} prompts hold what the tokenizer does not know, which "
                     f"becomes {tokenizer.unk_token!r}. Take it out, or use another student.")  # fmt: skip
    return found


def _too_long(name: str, part: EncodedPrompts, config: DataConfig) -> Iterator[str]:
    count, limit = part.dropped + part.truncated, config.max_prompt_tokens
    if count:
        what = "are left out" if part.dropped else "lose their beginning"
        yield (f"data.max_prompt_tokens: {count} of {len(part) + part.dropped} {name} prompts have more than {limit} "
               f"tokens and {what} (data.overlong={config.overlong}).")  # fmt: skip


def _overlap(train: EncodedPrompts, validation: EncodedPrompts, config: DataConfig) -> Iterator[str]:
    trained_on = set(map(tuple, train.ids))
    common = sum(tuple(prompt) in trained_on for prompt in validation.ids)
    if common:
        key = "data.validation_path" if config.validation_path else "data.path"
        yield (f"{key}: {common} of {len(validation)} validation prompts reach the student as training prompts too, so "
               "val/* is not measured on held-out prompts. Take them out of one of the two.")  # fmt: skip


def _begun_twice(ids: Sequence[Sequence[int]], tokenizer: Any) -> Iterator[str]:
    bos = tokenizer.bos_token_id
    count = sum(prompt[0] == bos and bos in prompt[1:3] for prompt in ids)
    if count:
        yield (f"data.prompt_column: {count} of {len(ids)} prompts begin with {tokenizer.bos_token!r}, which the "
               "tokenizer writes too. Take it out of the prompts, or of data.prompt_template.")  # fmt: skip


def _rendered_before(texts: Sequence[str], config: DataConfig, tokenizer: Any) -> Iterator[str]:
    """Look in prompts for special tokens, and for the template's own words at their ends."""
    probe = "\0"  # no template and no prompt has it
    written = render({config.prompt_column: [{"role": "user", "content": probe}]}, config, tokenizer)
    before, _, after = written.removeprefix(tokenizer.bos_token or "").partition(probe)
    opening = before.strip().splitlines()[-1:]
    markers = [token for token in tokenizer.all_special_tokens if token.strip()]
    held: dict[str, int] = {}
    for text in texts:
        bare = text.strip()
        ends = [m for m in opening if m and bare.startswith(m)] + [m for m in [after.strip()] if m and bare.endswith(m)]
        for marker in [m for m in markers if m in text][:1] or ends[:1]:
            held[marker] = held.get(marker, 0) + 1
    if held:
        most = max(held, key=held.__getitem__)
        yield (f"data.chat: {sum(held.values())} of {len(texts)} prompts hold {most!r}, and the chat template is "
               "written around them again. Set data.chat=false, or give them without it.")  # fmt: skip
