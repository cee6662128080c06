"""The spans of two tokenizers: against cuts found by hand and byte by byte, with ends and broken text."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teachers.two_tokenizers import byte_tokenizer, in_bytes, word_tokenizer
from tokenizers import normalizers

from lit_opd.errors import UserError
from lit_opd.teachers import TextSpans

STUDENT = byte_tokenizer([("a", "b"), ("ab", "c"), (" ", "a"), (b"\xf0", b"\x9f")], ("<|end|>", "<|turn|>", "<|own|>"))
TEACHER = byte_tokenizer([("b", "c"), (b"\xc3", b"\xa9"), ("a", "d"), ("d", "é")], ("<eos>", "<|turn|>", "<|end|>"))
SPANS = TextSpans(STUDENT, TEACHER)


def ids_of(*pieces):
    return [STUDENT.convert_tokens_to_ids(p if str(p).startswith("<|") else in_bytes(p)) for p in pieces]


@pytest.mark.parametrize(("pieces", "spans", "teacher", "exact"), [
    (["abc", "ab", "d"], [0, 1, 2], [0, 0, 1, 1, 2], [0, 0, 1]),  # of the teacher: a bc, a b, d
    (["abc", "a", "d"], [0, 1, 1], [0, 0, 1], [0, 0, 0]),  # a bc, ad
    (["a", "b", "c"], [0, 1, 1], [0, 1], [1, 0, 0]),  # as the student does not spell it by itself
    ([b"\xc3", b"\xa9", "x"], [0, 0, 1], [0, 1], [0, 0, 1]),  # no cut inside of a character
    (["a", "<|turn|>", "b", "<|own|>", "c"], [0, 1, 2, -1, 3], [0, 1, 2, 3], [1, 1, 1, 0, 1]),
    (["<", "|", "e"], [0, 1, 2], [0, 1, 2], [1, 1, 1]),
    ([], [], [], []),
])  # fmt: skip
def test_both_are_cut_where_both_have_a_boundary(pieces, spans, teacher, exact):
    found = SPANS.align(ids_of(*pieces))
    assert (found.spans, found.teacher_spans, found.exact) == (spans, teacher, exact)


@given(st.text("abcdé <|> 是👍é", max_size=12))
def test_no_shared_cut_is_missed_and_none_is_made_up(text):
    """Byte by byte: cuts of both at the same byte that is the end of a character."""
    ids = [STUDENT(part, split_special_tokens=True)["input_ids"] for part in (text[:4], text[4:])]
    ids = [index for part in ids for index in part]  # so that some are not spelt as the student's tokenizer would
    found, (own, theirs) = SPANS.align(ids), (
        list(accumulate(len(t) for t in tokenizer.convert_ids_to_tokens(part)))
        for tokenizer, part in ((STUDENT, ids), (TEACHER, TEACHER(text, split_special_tokens=True)["input_ids"]))
    )  # fmt: skip
    shared = {len(text[:i].encode()) for i in range(len(text) + 1)} & set(own) & set(theirs)
    assert found.spans == [sum(cut < end for cut in shared) for end in own]
    assert found.teacher_spans == [sum(cut < end for cut in shared) for end in theirs]


@pytest.mark.parametrize("pieces", [[b"\xe2", b"\x82"], [b"\xe2", "a"], [b"\xac", b"\xac"], ["a", b"\xe2"]])
def test_bytes_that_are_no_text_are_read_as_the_character_that_stands_for_them(pieces):
    found = SPANS.align(ids_of(*pieces))
    assert TEACHER.decode(found.ids) == STUDENT.decode(ids_of(*pieces))
    assert set(found.spans) == set(found.teacher_spans)
    assert not found.exact[-1] or pieces[-1] == "a"


def test_the_end_is_a_span_of_its_own_and_the_teachers_end():
    for piece in ("<|end|>", "<|own|>"):  # whatever its name, and though the teacher has another of the same name
        found = SPANS.align(ids_of("a", "b", piece), stopped=True)
        assert (found.ids[-1], found.exact) == (TEACHER.eos_token_id, [True, True, True])
    cut = SPANS.align(ids_of("a", "b"))
    assert cut.ids == found.ids[:-1]


def test_the_end_of_a_turn_is_that_of_the_teachers_template():
    student, teacher = byte_tokenizer((), ("<|end|>", "<|im|>")), byte_tokenizer((), ("<eos>", "<turn>", "<|end|>"))
    student.chat_template = "{% for m in messages %}{{ m.content }}<|im|>{% endfor %}"
    teacher.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    spans = TextSpans(student, teacher)
    names = {own: teacher.convert_ids_to_tokens(spans.end(student.convert_tokens_to_ids(own)))
             for own in ("<|im|>", "<|end|>")}  # fmt: skip
    assert names == {"<|im|>": "<turn>", "<|end|>": "<eos>"}


def test_text_that_the_teacher_does_not_know_is_in_no_span():
    student = word_tokenizer(["<unk>", "<eos>", *"abc"])
    spans = TextSpans(student, word_tokenizer(["<eos>", "<unk>", "ab", "a"], "ab|."))
    assert spans.align(student("aba")["input_ids"]).spans == [0, 0, 1]
    found = spans.align(student("abca<eos>")["input_ids"], stopped=True)
    assert (found.spans, found.teacher_spans) == ([-1, -1, -1, -1, 0], [-1, -1, -1, 0])


def test_a_tokenizer_that_changes_a_text_is_compared_on_the_whole_of_it():
    student, teacher = byte_tokenizer(), byte_tokenizer()
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    spans = TextSpans(student, teacher)
    assert spans.align(student("ab")["input_ids"]).exact == [True, True]
    found = spans.align(student("aBc")["input_ids"])
    assert (found.spans, found.teacher_spans) == ([0, 0, 0], [0, 0, 0])


def test_the_share_is_of_the_students_tokens():
    assert SPANS.share(["abcabd", "x"]) == 2 / 4
    assert TextSpans(STUDENT, STUDENT).share(["abcabd 是"]) == 4 / 7  # three bytes, which are one character
    assert SPANS.share([]) == 0


@pytest.mark.parametrize(("text", "stopped", "decided"), [
    ("9;18;", False, [2, 4, 4, 4]),  # 9 when ; is known and followed by 1, and the last at the end
    ("9;18;", True, [2, 4, 5, 5, 5]),
    ("9", False, [0]),
    ("9", True, [1, 1]),
])  # fmt: skip
def test_a_span_is_decided_by_the_word_after_it(text, stopped, decided):
    student = word_tokenizer(["<unk>", "<eos>", *"0123456789;"])
    spans = TextSpans(student, word_tokenizer(["<eos>", "<unk>", ";", "9", "18"], r"\d\d|."))
    ids = student(text)["input_ids"] + [student.eos_token_id] * stopped
    found = spans.align(ids, stopped)
    assert [found.decided[number] for number in sorted(set(found.spans))] == decided


def test_without_words_everything_is_decided_at_the_end():
    student = byte_tokenizer()
    student.backend_tokenizer.pre_tokenizer = None
    found = TextSpans(student, student).align(student("abc")["input_ids"])
    assert found.decided == {0: 2, 1: 2, 2: 2}


def test_a_tokenizer_without_texts_or_without_an_end_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"teacher\.path: expected a tokenizer of the library tokenizers .* found Slow"):
        TextSpans(STUDENT, Slow())
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match=r"teacher\.path: expected a tokenizer with a token that ends a completion"):
        TextSpans(STUDENT, endless)
