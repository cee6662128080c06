"""Check that all models of a run mean the same token by the same id, and look up ids of tokens.

Divergences are sums over ids, and would be meaningless otherwise. `Pair` and the audit compare vocabularies before any
weight loads, and configuration keys that name tokens are looked up here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lit_opd.errors import UserError

__all__ = ["shared_vocabulary", "token_ids"]


def shared_vocabulary(
    student_tokenizer: Any, other_tokenizer: Any, student_rows: int, other_rows: int, key: str = "teacher"
) -> int:
    """Count the ids, from 0, that the student and another model share.

    The tokenizers must agree on every id. The output layers, of so many rows, may differ in padding rows behind the
    last real token.

    Raises:
        UserError: naming the first id on which the tokenizers differ, or the layer that is too short.
    """
    for who, tokenizer, rows in (("student", student_tokenizer, student_rows), (key, other_tokenizer, other_rows)):
        token, last = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        if last >= rows:
            expected = f"an output layer of at least {last + 1} rows, one a token"
            remedy = "Take added tokens out of the tokenizer (padding needs none here), or resize the model."
            raise UserError(f"{who}.path", expected, f"{rows}, and none for {token!r} (id {last})", remedy)
    student = {index: token for token, index in student_tokenizer.get_vocab().items()}
    other = {index: token for token, index in other_tokenizer.get_vocab().items()}
    for index in sorted(student.keys() | other.keys()):
        if student.get(index) != other.get(index):
            found = f"id {index} is {student.get(index)!r} for the student and {other.get(index)!r} for the {key}"
            remedy = f"Choose a {key} and a student of one tokenizer family."
            if None in (student.get(index), other.get(index)):
                remedy += " If it was added to one of the two, take it out (padding needs none here)."
            raise UserError(f"{key}.path", "the student's tokenizer, id by id", found, remedy)
    return min(student_rows, other_rows)


def token_ids(tokenizer: Any, tokens: Iterable[str | int], key: str) -> list[int]:
    """Look up the ids of single tokens, given as texts or as ids under a configuration key.

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
