"""Align the tokens of two tokenizers by the spans of text that both of them delimit.

A completion's text is written again in the teacher's tokens. Where a token of the student and one of the teacher end at
the same character, both are cut: what lies between two cuts is a span. Whether a cut is one may depend on text after
it: a teacher with a token `98` has a cut behind `9` only if no `8` follows. So a span is decided by a later token.
`AlignedScorer` and the check before a run read the spans.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from lit_opd.errors import UserError
from lit_opd.models import end_of_turn

__all__ = ["Aligned", "TextSpans"]


class Aligned(NamedTuple):
    """A completion in the tokens of both tokenizers.

    Attributes:
        ids: the teacher's tokens.
        spans: the number of the span that each of the student's tokens is in, -1 for none.
        teacher_spans: the same of the teacher's tokens.
        decided: by the number of a span, the index of the student's token from which on no text can change it.
    """

    ids: list[int]
    spans: list[int]
    teacher_spans: list[int]
    decided: dict[int, int]

    @property
    def exact(self) -> list[bool]:
        """True at the student's tokens whose span is one token of the student and one of the teacher."""
        own, other = Counter(self.spans), Counter(self.teacher_spans)
        return [number >= 0 and own[number] == other[number] == 1 for number in self.spans]


class TextSpans:
    """Write completions of the student in the teacher's tokens.

    Text is encoded as the teacher's tokenizer encodes it by itself, which is one of several spellings that the teacher
    could write. Special tokens are no text: the one that ends a completion becomes the teacher's, and any other the
    teacher's of the same name, or none.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        key: of the teacher's section.

    Raises:
        UserError: a tokenizer that is not of the library `tokenizers`, or a teacher's without an end.
    """

    def __init__(self, student: Any, teacher: Any, key: str = "teacher") -> None:
        for who, tokenizer in (("student", student), (key, teacher)):
            if not getattr(tokenizer, "is_fast", False):
                expected = "a tokenizer of the library tokenizers (tokenizer.json), whose tokens are found in a text"
                remedy = "Save it as one, or drop teacher.least_aligned."
                raise UserError(f"{who}.path", expected, type(tokenizer).__name__, remedy)
        self.student, self.teacher = student, teacher
        known = {name: index for index, name in _special(teacher).items()}
        self._special = {index: known.get(name) for index, name in _special(student).items()}
        self._turn, turn, end = end_of_turn(student), end_of_turn(teacher), teacher.eos_token_id
        self._ends = [index for index in (end, turn) if index is not None]
        if not self._ends:
            remedy = "Name one as eos_token in its tokenizer_config.json."
            raise UserError(f"{key}.path", "a tokenizer with a token that ends a completion", "none", remedy)

    def end(self, index: int) -> int:
        """Find the teacher's token that ends a completion where the student's token `index` does."""
        same = self._special.get(index)
        if same is not None and same in self._ends:
            return same
        return self._ends[-1 if index == self._turn else 0]

    def align(self, ids: Sequence[int], stopped: bool = False) -> Aligned:
        """Align a completion.

        Args:
            ids: the student's tokens.
            stopped: whether the last of them ended the completion.
        """
        found = Aligned([], [], [], {})
        text = ids[:-1] if stopped else ids
        for special, run in groupby(text, key=lambda index: index in self._special):
            if special:
                for index in run:
                    _add_token(found, self._special[index])
            else:
                self._add_text(found, list(run))
        if stopped:
            _add_token(found, self.end(ids[-1]))
        last = len(ids) - 1
        return found._replace(decided={number: min(index, last) for number, index in found.decided.items()})

    def share(self, texts: Sequence[str]) -> float:
        """Compute the share of the student's tokens of texts that are exactly aligned."""
        encoded = [self.student(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        exact = [one for ids in encoded for one in self.align(ids).exact]
        return sum(exact) / max(len(exact), 1)

    def _add_text(self, found: Aligned, ids: list[int]) -> None:
        text, own = _cuts(self.student, ids)
        # Words such as <|im_end|> that the student spelt letter by letter are text to the teacher, too.
        others = self.teacher(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        read, theirs = _cuts(self.teacher, others)
        shared: set[int | None] = {len(text)}
        if read == text:
            shared |= set(own) & set(theirs) - {None}
        else:  # a tokenizer that changes a text is compared on the whole of it
            theirs = [None] * (len(others) - 1) + [len(text)] if others else []
        first = 1 + max(found.spans, default=-1)
        spans, teacher_spans = _numbers(own, shared, first), _numbers(theirs, shared, first)
        unknown = {number for number, index in zip(teacher_spans, others, strict=True) if self._is_unknown(index)}
        unscored = unknown | (set(spans) - set(teacher_spans))
        before, ends, reached = len(found.spans), _ends_of_words(self.teacher, text), _reached(own)
        for number, cut in zip(teacher_spans, theirs, strict=True):
            if cut is not None and cut in shared:
                found.decided[number] = before + bisect_left(reached, _decided_at(ends, cut))
        found.ids.extend(others)
        found.spans.extend(-1 if number in unscored else number for number in spans)
        found.teacher_spans.extend(-1 if number in unscored else number for number in teacher_spans)

    def _is_unknown(self, index: int) -> bool:
        # GPT-2's end of text stands for unknown ones too, of which it has none.
        return index == self.teacher.unk_token_id and index not in self._ends


def _special(tokenizer: Any) -> dict[int, str]:
    """List the special tokens, which are no text, by id."""
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**added, **dict(named)}


def _cuts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """Decode tokens, and find the character that each ends before, None inside of a character.

    Bytes that are no text are read as U+FFFD, and belong to the token that ends them.
    """
    backend, stream = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=False)
    whole, length, cuts = backend.decode(list(ids), skip_special_tokens=False), 0, list[int | None]()
    try:
        pieces = [stream.step(backend, index) for index in ids]
    except Exception:  # tokenizers has no other class for a decoder that changes what it wrote before
        pieces = [None] * len(ids)
    for piece in pieces:
        length += len(piece or "")
        cuts.append(length if piece and length < len(whole) else None)
    if not whole.startswith("".join(piece or "" for piece in pieces)):
        cuts = [None] * len(ids)
    return whole, [*cuts[:-1], len(whole)] if ids else []


def _numbers(cuts: Sequence[int | None], shared: set[int | None], first: int) -> list[int]:
    """Number the span of each token, which ends at a shared cut."""
    numbers, number = [], first
    for cut in cuts:
        numbers.append(number)
        number += cut in shared
    return numbers


def _ends_of_words(tokenizer: Any, text: str) -> list[int]:
    """List where the words of a text end, which are what its tokenizer splits it into before it merges anything."""
    words = tokenizer.backend_tokenizer.pre_tokenizer
    found = words.pre_tokenize_str(text) if words is not None else []
    return [end for _, (start, end) in found if not text[start:end].isspace()]


def _decided_at(ends: Sequence[int], cut: int) -> float:
    """Find how many characters have to be known for a cut to stay: all of the next word, and one behind it.

    With the usual patterns one character behind a word settles it, but for white space, which goes on with the word
    behind it. Infinite where later text may still change the cut, as it may without words.
    """
    following = bisect_left(ends, cut) + 1
    return ends[following] + 1 if following < len(ends) else math.inf


def _reached(cuts: Sequence[int | None]) -> list[int]:
    """Count the characters that are known after each token, those inside of a character left out."""
    return list(accumulate((cut or 0 for cut in cuts), max))


def _add_token(found: Aligned, index: int | None) -> None:
    """Add a token that is a span of its own, or one of the student's that the teacher does not have."""
    number = -1 if index is None else 1 + max(found.spans, default=-1)
    found.decided[number] = len(found.spans)
    found.spans.append(number)
    if index is not None:
        found.ids.append(index)
        found.teacher_spans.append(number)
