"""Find what is most likely not meant in prompts that can be used all the same.

Why here: nothing of it stops a run, and each of it spoils one without a word. The data module tells the findings
before training, so `fit` and `audit` say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lit_opd.config import DataConfig
from lit_opd.data.prompts import EncodedPrompts, own_text, render

__all__ = ["find_in_prompts"]


def find_in_prompts(train: EncodedPrompts, validation: EncodedPrompts, config: DataConfig, tokenizer: Any) -> list[str]:
    """Look at all prompts, as they lie in the data and as the student gets them.

    Returns:
        One sentence a finding, which begins with the key.
    """
    ids, bos, unknown = train.ids + validation.ids, tokenizer.bos_token_id, tokenizer.unk_token_id
    texts = [own_text(row, config) for row in train.rows + validation.rows]
    begun = 0 if config.chat else sum(prompt[0] == bos and bos in prompt[1:3] for prompt in ids)
    held = _of_the_template(texts, config, tokenizer) if config.chat else Counter()
    lost = sum(unknown in prompt for prompt in ids) if unknown != tokenizer.eos_token_id else 0
    trained_on = set(map(tuple, train.ids))
    common = sum(tuple(prompt) in trained_on for prompt in validation.ids)
    spelled = sum(text.lstrip().startswith("[{") and "role" in text for text in texts)
    path, column = "data.validation_path" if config.validation_path else "data.path", "data.prompt_column"
    long = "lose their beginning" if config.overlong == "truncate" else "are left out"
    long = f"have more than {config.max_prompt_tokens} tokens and {long} (data.overlong={config.overlong})"
    template = "".join(marker for marker, _ in held.most_common(1))
    found = [
        *(("data.max_prompt_tokens", part.dropped + part.truncated, len(part) + part.dropped, f"{name} prompts {long}")
          for name, part in (("training", train), ("validation", validation))),
        (path, common, len(validation), "validation prompts reach the student as training prompts too, so val/* is not "
         "measured on held-out prompts. Take them out of one of the two"),
        (column, begun, len(ids), f"prompts begin with {tokenizer.bos_token!r}, which the tokenizer writes too. Take "
         "it out of the prompts, or of data.prompt_template"),
        ("data.chat", held.total(), len(ids), f"prompts hold {template!r}, and the chat template is written around "
         "them again. Set data.chat=false, or give them without it"),
        (column, spelled, len(ids), "prompts are lists of messages that are spelled as text, and reach the student "
         "so. Give them as lists, in .jsonl or .parquet"),
        (column, lost, len(ids), f"prompts hold what the tokenizer does not know, which becomes "
         f"{tokenizer.unk_token!r}. Take it out, or use another student"),
    ]  # fmt: skip
    return [f"{key}: {count} of {total} {what}." for key, count, total, what in found if count]


def _of_the_template(texts: Sequence[str], config: DataConfig, tokenizer: Any) -> Counter[str]:
    """Count texts that hold a special token, or what the template writes before or after a message of the user."""
    probe = "\0"  # which no template and no prompt has
    written = render({config.prompt_column: [{"role": "user", "content": probe}]}, config, tokenizer)
    before, _, after = (part.strip() for part in written.removeprefix(tokenizer.bos_token or "").partition(probe))
    markers = [*tokenizer.all_special_tokens, *before.splitlines()[-1:], after]
    held = (next((marker for marker in markers if marker and marker in text), None) for text in texts)
    return Counter(marker for marker in held if marker)
