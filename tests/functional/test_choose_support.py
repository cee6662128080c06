"""Supports against Python's sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.functional import SUPPORTS, choose_support

fast = settings(max_examples=100, deadline=None)
every_support = pytest.mark.parametrize("source", SUPPORTS)


@st.composite
def rankings(draw):
    """Student and teacher values without ties, as permutations of 0 to V - 1, and a K that fits."""
    vocabulary = draw(st.integers(1, 9))
    student, teacher = (draw(st.permutations(range(vocabulary))) for _ in range(2))
    return student, teacher, draw(st.integers(1, vocabulary))


def best(values, k):
    return set(sorted(range(len(values)), key=lambda token: -values[token])[:k])


def expected_set(student, teacher, k, source):
    s, t = best(student, k), best(teacher, k)
    return {"teacher": t, "student": s, "union": s | t, "intersection": s & t}[source]


def chosen(student, teacher, k, source):
    ids, mask = choose_support(torch.tensor(student).double(), torch.tensor(teacher).double(), k, source)
    return ids[mask].tolist(), mask


@every_support
@fast
@given(rankings())
def test_it_is_the_set_of_the_most_probable_tokens_each_once(source, ranking):
    student, teacher, k = ranking
    found, mask = chosen(student, teacher, k, source)
    assert len(found) == len(set(found))
    assert set(found) == expected_set(student, teacher, k, source)
    assert mask.shape == ((2 * k,) if source == "union" else (k,))


@every_support
@fast
@given(st.lists(rankings(), min_size=2, max_size=3))
def test_every_position_is_for_itself(source, rows):
    """Two positions stacked in front give what each gives alone."""
    vocabulary = min(len(student) for student, _, _ in rows)
    k = min(min(k for _, _, k in rows), vocabulary)
    student, teacher = (torch.tensor([row[i][:vocabulary] for row in rows]).double()[:, None] for i in (0, 1))
    ids, mask = choose_support(student, teacher, k, source)
    for i in range(len(rows)):
        alone_ids, alone_mask = choose_support(student[i, 0], teacher[i, 0], k, source)
        assert set(ids[i, 0][mask[i, 0]].tolist()) == set(alone_ids[alone_mask].tolist())


@fast
@given(rankings())
def test_union_and_intersection_share_their_tokens_out(ranking):
    """|S and T| + |S or T| = 2K, and both are the same with the models exchanged."""
    student, teacher, k = ranking
    union, both = (set(chosen(student, teacher, k, source)[0]) for source in ("union", "intersection"))
    assert len(union) + len(both) == 2 * k
    assert both <= union
    assert union == set(chosen(teacher, student, k, "union")[0])
    assert both == set(chosen(teacher, student, k, "intersection")[0])


@every_support
@fast
@given(rankings())
def test_as_large_as_the_vocabulary_it_is_the_vocabulary(source, ranking):
    student, teacher, _ = ranking
    found, _ = chosen(student, teacher, len(student), source)
    assert sorted(found) == list(range(len(student)))


@every_support
@fast
@given(st.lists(st.integers(0, 2), min_size=4, max_size=8), st.integers(1, 4))
def test_of_equally_probable_tokens_any_are_chosen_but_as_many_and_as_probable(source, values, k):
    found, _ = chosen(values, values, k, source)
    assert len(set(found)) == len(found) == k
    assert sorted(values[token] for token in found) == sorted(values)[-k:]


@every_support
def test_tokens_nobody_can_write_come_last(source):
    impossible = -torch.inf
    student, teacher = [impossible, 0.0, 1.0, impossible], [impossible, 1.0, 0.0, impossible]
    assert set(chosen(student, teacher, 2, source)[0]) == {1, 2}


def test_an_intersection_may_be_empty():
    assert chosen([3, 2, 1, 0], [0, 1, 2, 3], 2, "intersection")[0] == []


def test_refuses_an_unknown_source():
    with pytest.raises(ValueError, match="support must be one of teacher, student, union, intersection, found 'both'"):
        choose_support(torch.zeros(4), torch.zeros(4), 2, "both")
