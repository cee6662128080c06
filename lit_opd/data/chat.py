"""Put messages through a tokenizer's chat template, with the keywords that the template reads.

`prompts` calls it for chats. A keyword that a template does not read changes nothing, and the template does not say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from lit_opd.config import DataConfig
from lit_opd.errors import UserError, suggest

__all__ = ["ASSISTANT", "apply_chat", "check_template_keywords"]

ASSISTANT = ("assistant", "model", "gpt", "bot", "chatbot", "ai")  # as data sets and templates spell it
GIVEN_HERE = {"messages", "add_generation_prompt"}  # variables of a template that `apply_chat` sets


def apply_chat(messages: Sequence[Mapping[str, Any]], config: DataConfig, tokenizer: Any) -> str:
    """Write a conversation as the tokenizer's template does, open for the assistant to begin or go on.

    Raises:
        UserError: there is no template, or it does not take the messages.
    """
    if not tokenizer.chat_template:
        remedy = "Set data.chat=false or use a tokenizer with a chat template."
        raise UserError("data.chat", "false, as the tokenizer has no chat template", "true", remedy)
    if config.system_prompt is not None and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    goes_on = str(messages[-1]["role"]).lower() in ASSISTANT
    ends: dict[str, Any] = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **ends, **config.chat_template_kwargs)
    except Exception as error:  # whatever the tokenizer's own template raises
        cause = f"{type(error).__name__}: {error}"
        remedy = "Check the roles and data.system_prompt."
        raise UserError("data.chat", "messages that the tokenizer's chat template accepts", cause, remedy) from error


def check_template_keywords(config: DataConfig, tokenizer: Any) -> None:
    """Refuse keywords in `chat_template_kwargs` that the tokenizer's template does not read.

    Raises:
        UserError: there is one.
    """
    if not config.chat_template_kwargs or not tokenizer.chat_template:
        return
    known = _variables(tokenizer.get_chat_template()) - GIVEN_HERE
    for name in config.chat_template_kwargs:
        if name not in known:
            expected = "keywords that the tokenizer's chat template reads"
            raise UserError("data.chat_template_kwargs", expected, repr(name), suggest(str(name), known))


@lru_cache
def _variables(template: str) -> frozenset[str]:
    # By the environment of transformers, which knows tags that jinja2's own does not, as {% generation %}.
    environment = _compile_jinja_template(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys())
