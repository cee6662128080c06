"""Tokens and ids: all models must mean the same by them, checked id by id before any weights load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lit_opd.errors import UserError

__all__ = ["shared_vocabulary", "token_ids"]


def shared_vocabulary(
    student_tokenizer: Any, other_tokenizer: Any, student_rows: int, other_rows: int, key: str = "teacher"
) -> int:
    """How many ids the student and another model share.

    The tokenizers must agree on every id. The output layers may differ in padding rows behind the last real token.

    Args:
        student_tokenizer: the student's tokenizer.
        other_tokenizer: the other model's tokenizer.
        student_rows: rows of the student's output layer.
        other_rows: rows of the other model's output layer.
        key: `teacher` or `reference`, for messages.

    Returns:
        The number of ids, from 0, that both output layers have.

    Raises:
        UserError: naming the first id on which the tokenizers differ, or the layer that is too short.
    """
    student = {index: token for token, index in student_tokenizer.get_vocab().items()}
    other = {index: token for token, index in other_tokenizer.get_vocab().items()}
    for index in sorted(student.keys() | other.keys()):
        if student.get(index) != other.get(index):
            found = f"id {index} is {student.get(index)!r} for the student and {other.get(index)!r} for the {key}"
            raise UserError(f"{key}.path", "the student's tokenizer, id by id", found,
                            f"Choose a {key} and a student of one tokenizer family.")  # fmt: skip
    shared, tokens = min(student_rows, other_rows), max(student) + 1
    if shared < tokens:
        short = "student" if student_rows < other_rows else key
        expected = f"an output layer of at least {tokens} rows, one a token"
        raise UserError(f"{short}.path", expected, shared, "Resize or replace it.")
    return shared


def token_ids(tokenizer: Any, tokens: Iterable[str | int], key: str) -> list[int]:
    """The ids of single tokens given as text or as ids.

    Args:
        tokenizer: whose vocabulary they are of.
        tokens: texts or ids.
        key: the configuration key they come from, for messages.

    Raises:
        UserError: a text that is no single token, or an id that no token has.
    """
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    ids = []
    for token in tokens:
        index = token if isinstance(token, int) else vocabulary.get(token)
        if index not in known:
            raise UserError(key, "single tokens of the student's tokenizer, or their ids", repr(token), "Correct it.")
        ids.append(int(index))
    return ids
