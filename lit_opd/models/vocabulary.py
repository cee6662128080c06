"""Check that all models of a run mean the same token by the same id, and look up ids of tokens.

Divergences are sums over ids, and would be meaningless otherwise. `Pair` and the audit compare vocabularies before any
weight loads, and configuration keys that name tokens are looked up here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lit_opd.errors import UserError

__all__ = ["check_rows", "extra_of", "shared_vocabulary", "token_ids"]


def shared_vocabulary(
    student_tokenizer: Any,
    other_tokenizer: Any,
    student_rows: int,
    other_rows: int,
    key: str = "teacher",
    extra_tokens: str = "refuse",
) -> int:
    """Count the ids, from 0, that the student and another model share.

    The tokenizers must agree on every id. The output layers, of so many rows, may differ in padding rows behind the
    last real token. With `extra_tokens="mask"` the other's vocabulary may go on where the student's ends: only the
    student's tokens are shared then.

    Raises:
        UserError: naming the first id on which the tokenizers differ, or the layer that is too short.
    """
    check_rows(student_tokenizer, student_rows, "student")
    check_rows(other_tokenizer, other_rows, key)
    student = {index: token for token, index in student_tokenizer.get_vocab().items()}
    other = {index: token for token, index in other_tokenizer.get_vocab().items()}
    shared, extra = min(student_rows, other_rows), extra_of(student_tokenizer, other_tokenizer)
    if extra_tokens == "mask" and extra:
        other, shared = {i: token for i, token in other.items() if i not in extra}, min(shared, *extra)
    for index in sorted(student.keys() | other.keys()):
        if student.get(index) != other.get(index):
            found = f"id {index} is {student.get(index)!r} for the student and {other.get(index)!r} for the {key}"
            remedy = f"Choose a {key} and a student of one tokenizer family."
            if key == "teacher":
                remedy += " To compare spans of text, set teacher.least_aligned (tutorials/07_teachers.md)."
            if index in extra and key == "teacher":
                remedy = f"To leave the teacher's {len(extra)} extra tokens out, set teacher.extra_tokens=mask."
            if None in (student.get(index), other.get(index)):
                remedy += " If it was added to one of the two, take it out (padding needs none here)."
            raise UserError(f"{key}.path", "the student's tokenizer, id by id", found, remedy)
    return shared


def check_rows(tokenizer: Any, rows: int, key: str) -> None:
    """Compare a tokenizer with the rows of its model's output layer.

    Raises:
        UserError: a token has none.
    """
    token, last = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if last >= rows:
        expected = f"an output layer of at least {last + 1} rows, one a token"
        remedy = "Take added tokens out of the tokenizer (padding needs none here), or resize the model."
        raise UserError(f"{key}.path", expected, f"{rows}, and none for {token!r} (id {last})", remedy)


def extra_of(student_tokenizer: Any, other_tokenizer: Any) -> dict[int, str]:
    """Find the tokens of another model whose ids lie behind the student's last, by id."""
    last = max(student_tokenizer.get_vocab().values())
    return {index: token for token, index in sorted(other_tokenizer.get_vocab().items()) if index > last}


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
