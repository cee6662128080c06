"""Packed layouts against sets of prefixes and naive loops; row selection against plain indexing."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from references import rollout_from

from lit_opd.models.packing import gather_rows, layout_of, pack
from lit_opd.types import SamplingLaw

fast = settings(max_examples=80, deadline=None)
CPU = torch.device("cpu")
# Three letters, and beginnings that are longer than what is worth a segment of its own.
short = st.lists(st.integers(0, 2), min_size=1, max_size=7)
beginnings = st.sampled_from([[], [0] * 20, [0] * 20 + [1] * 18, [0, 1] * 20])
rows = st.lists(st.builds(lambda first, rest: first + rest, beginnings, short), min_size=1, max_size=8)


# Long enough for lengths, and for the number of tokens, to be rounded.
LONG = [[9] * 70 + [row] * 77 for row in range(7)]


def prefixes(sequences):
    return {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}


def text(layout, tokens):
    return layout.ids_N[torch.tensor(tokens)].tolist()


@fast
@given(rows)
@example(LONG)
def test_paths_spell_the_sequences(sequences):
    layout, paths = pack(sequences, CPU)
    assert [text(layout, path) for path in paths] == sequences
    for path in paths:
        assert layout.positions_N[torch.tensor(path)].tolist() == list(range(len(path)))


@fast
@given(rows)
@example(LONG)
def test_every_distinct_beginning_is_held_once(sequences):
    layout, paths = pack(sequences, CPU)
    count = len(prefixes(sequences))
    assert sorted({token for path in paths for token in path}) == list(range(count))
    assert len(layout.ids_N) == len(layout.positions_N) == len(layout.place_N)
    # What rounding adds stands at the end.
    assert len(layout.ids_N) == (count if count < 512 else -(-count // 64) * 64)
    assert layout.queries_SL.max() == count - 1
    spelled = {tuple(path[: n + 1]): tuple(sequence[: n + 1])
               for path, sequence in zip(paths, sequences, strict=True) for n in range(len(path))}  # fmt: skip
    assert set(spelled.values()) == prefixes(sequences)
    assert len(spelled) == len(prefixes(sequences)), "two paths spell one beginning"


@fast
@given(rows)
@example(LONG)
def test_every_token_is_a_query_once_and_sees_its_own_beginning_in_order(sequences):
    layout, paths = pack(sequences, CPU)
    count = len(prefixes(sequences))
    places = layout.place_N[:count].tolist()
    assert layout.queries_SL.flatten()[places].tolist() == list(range(count))
    assert len(set(places)) == count
    beginning = {path[n]: path[: n + 1] for path in paths for n in range(len(path))}
    seen = [keys[row].tolist() for keys, rows in zip(layout.keys_SM, layout.seen_SLM, strict=True) for row in rows]
    for token, place in enumerate(places):
        assert seen[place] == beginning[token]
    for place in set(range(len(seen))) - set(places):
        assert len(seen[place]) == 1, "a query that does not exist sees the first key only"


@fast
@given(rows)
@example(LONG)
def test_a_window_lets_a_query_see_the_last_of_its_keys(sequences):
    layout, _ = pack(sequences, CPU)
    distances = layout.positions_N[layout.queries_SL][:, :, None] - layout.positions_N[layout.keys_SM][:, None]
    assert torch.equal(layout.within_SLM(3), layout.seen_SLM & (distances < 3))
    assert torch.equal(layout.within_SLM(None), layout.seen_SLM)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bias_is_zero_where_seen_and_made_once(dtype, window):
    layout, _ = pack([[0, 1, 2], [0, 1], [2]], CPU)
    bias, seen = layout.bias(dtype, window), layout.within_SLM(window)
    assert bias.dtype == dtype
    assert torch.equal(bias == 0, seen)
    assert torch.equal(torch.isneginf(bias), ~seen)
    assert layout.bias(dtype, window) is bias


@pytest.mark.parametrize(("prompt", "completion"), [(40, 20), (20, 40), (16, 45)])
def test_a_long_shared_prompt_is_a_segment_of_its_own(prompt, completion):
    layout, _ = pack([[7] * prompt + [row] * completion for row in range(4)], CPU)
    assert layout.queries_SL.shape == (5, max(prompt, completion))
    assert layout.keys_SM.shape == (5, prompt + completion)


def test_a_short_shared_prompt_is_not():
    layout, _ = pack([[7] * 15 + [row] * 45 for row in range(4)], CPU)
    assert layout.queries_SL.shape == (4, 60)
    assert len(layout.ids_N) == 15 + 4 * 45


def test_long_segments_are_rounded_so_that_lengths_come_again():
    layout, _ = pack(LONG, CPU)
    assert layout.queries_SL.shape == (8, 80)
    assert layout.keys_SM.shape == (8, 152)
    assert layout.seen_SLM.shape == (8, 80, 152)
    assert len(layout.ids_N) == 640


def test_rows_that_repeat_or_begin_others_need_no_segment():
    layout, paths = pack([[1, 2, 3], [1, 2], [1, 2, 3]], CPU)
    assert len(layout.queries_SL) == 2
    assert paths[0] == paths[2]
    assert paths[0][:2] == paths[1]


def make_rollout(prompts, completions, counted, extra=0):
    """Prompts padded on the left, completions on the right; what is padding holds a token that means nothing."""
    width, length = max(map(len, prompts)) + extra, max(map(len, completions))
    prompt_ids = torch.tensor([[9] * (width - len(p)) + p for p in prompts])
    ids = torch.tensor([c + [9] * (length - len(c)) for c in completions])
    mask = torch.tensor([[t < len(c) for t in range(length)] for c in completions])
    counted = torch.tensor([row + [False] * (length - len(row)) for row in counted])
    prompt_mask = torch.tensor([[i >= width - len(p) for i in range(width)] for p in prompts])
    zeros, index = torch.zeros(mask.shape), torch.arange(len(prompts))
    return rollout_from(
        prompt_ids, prompt_mask, ids, mask, counted, zeros, torch.zeros_like(index), SamplingLaw(), index
    )


@st.composite
def rollout_rows(draw):
    prompt, completion = draw(st.sampled_from([[1], [0] * 20, [0] * 20 + [2]])) + draw(short), draw(short)
    return prompt, completion, draw(st.lists(st.booleans(), min_size=len(completion), max_size=len(completion)))


@fast
@given(st.lists(rollout_rows(), min_size=1, max_size=6), st.integers(0, 3))
def test_each_counted_token_is_predicted_by_all_that_stands_before_it(rows, extra):
    """Masks with holes, rows without a counted token, prompts padded by more than they need."""
    prompts, completions, counted = zip(*rows, strict=True)
    rollout = make_rollout(prompts, completions, counted, extra)
    layout, predictors = layout_of(rollout)
    before = {}
    for row, mask in zip(layout.keys_SM.tolist(), layout.seen_SLM, strict=True):
        for seen in mask:
            tokens = [token for token, yes in zip(row, seen.tolist(), strict=True) if yes]
            before[tokens[-1]] = text(layout, tokens)
    expected = [p + c[:t] for p, c, m in rows for t in range(len(c)) if m[t]]
    assert [before[token] for token in predictors.tolist()] == expected
    assert predictors.dtype == torch.long


@fast
@given(st.lists(rollout_rows(), min_size=1, max_size=6))
def test_what_no_counted_token_follows_is_not_computed(rows):
    layout, _ = layout_of(make_rollout(*zip(*rows, strict=True)))
    needed = [p + c[: max([t for t in range(len(c)) if m[t]], default=0)] for p, c, m in rows]
    assert len(layout.ids_N) == len(prefixes(needed))


def test_a_rollout_of_one_row_without_a_counted_token_has_no_predictors():
    layout, predictors = layout_of(make_rollout([[1, 2]], [[3, 4]], [[False, False]]))
    assert predictors.shape == (0,)
    assert predictors.dtype == torch.long
    assert len(layout.ids_N) == 2


@pytest.mark.parametrize("index_shape", [(9,), (3, 4)])
@pytest.mark.parametrize("row_shape", [(5,), (2, 3)])
def test_gathered_rows_and_their_gradient_are_those_of_indexing(index_shape, row_shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, *row_shape, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 5, index_shape, generator=generator)  # some rows many times, the last never
    upstream = torch.randn(*index_shape, *row_shape, generator=generator, dtype=torch.float64)
    found, expected = gather_rows(values, index), values[index]
    assert torch.equal(found, expected)
    (found,), (expected,) = (torch.autograd.grad(x, values, upstream) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert not found[5].any()


@pytest.mark.parametrize("row_shape", [(), (4,)])
def test_the_gradient_of_a_shared_row_is_summed_in_fp32(row_shape):
    """Of single numbers, too: for wider rows torch's own bf16 sum happens to be exact on a CPU."""
    values = torch.zeros(2, *row_shape, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(300, dtype=torch.long)
    (found,) = torch.autograd.grad(gather_rows(values, index).sum(), values)
    assert found.dtype == torch.bfloat16
    assert (found[0] == 300).all()
    assert not found[1].any()
    one_by_one = torch.zeros((), dtype=torch.bfloat16)
    for _ in index:
        one_by_one += 1
    assert one_by_one == 256, "bf16 would have been enough, and this test shows nothing"
