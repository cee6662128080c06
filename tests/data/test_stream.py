import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_opd.data.stream import PromptStream
from lit_opd.errors import UserError

shapes = st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda pair: (max(pair), min(pair)))
seeds = st.integers(0, 3)


@given(shapes, seeds, st.integers(0, 4))
def test_rows_of_an_epoch_come_at_most_once(shape, seed, epoch):
    size, batch_size = shape
    stream = PromptStream(size, batch_size, seed)
    batches = [stream.batch(epoch * len(stream) + place) for place in range(len(stream))]
    rows = [row for batch in batches for row, _ in batch]
    assert len(rows) == len(set(rows)) == size // batch_size * batch_size
    assert set(rows) <= set(range(size))
    assert {len(batch) for batch in batches} == {batch_size}


@given(shapes, seeds, st.integers(0, 40), st.data())
def test_ranks_divide_the_batch_of_one_process(shape, seed, number, data):
    size, batch_size = shape
    world_size = data.draw(st.integers(1, min(batch_size, 5)))
    whole = PromptStream(size, batch_size, seed).batch(number)
    assert [draws for _, draws in whole] == [(number, i) for i in range(batch_size)]
    for rank in range(world_size):
        assert PromptStream(size, batch_size, seed, rank, world_size).batch(number) == whole[rank::world_size]


@given(shapes, seeds, st.integers(0, 20), st.integers(1, 20))
def test_resuming_anywhere_gives_the_tail(shape, seed, position, taken):
    whole, resumed = PromptStream(*shape, seed), PromptStream(*shape, seed, position=position)
    assert take(resumed, taken) == take(whole, position + taken)[position:]


def take(stream, number):
    batches = []
    while len(batches) < number:
        batches += list(stream)
    return batches[:number]


def test_a_pass_that_was_broken_off_is_continued():
    stream = PromptStream(10, 2, seed=0)
    first = next(iter(stream))
    assert [first, *stream] == take(PromptStream(10, 2, seed=0), 6)


def test_epochs_and_seeds_differ():
    orders = {
        tuple(row for place in range(20) for row, _ in PromptStream(20, 1, seed).batch(epoch * 20 + place))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_too_few_rows():
    with pytest.raises(
        UserError, match=r"data\.batch_size: expected at most the 3 training prompts there are, found 4"
    ):
        PromptStream(3, 4, seed=0)


def test_too_few_rows_for_every_rank():
    with pytest.raises(UserError, match=r"data\.batch_size: expected at least one prompt for each of 3 processes"):
        PromptStream(9, 2, seed=0, world_size=3)
