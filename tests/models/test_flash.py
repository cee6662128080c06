"""Flash attention over a packed layout, its kernel emulated, against attention by masks in float64."""

import pytest
import torch
from flash_on_cpu import emulated
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_opd.models import flash
from lit_opd.models.flash import attend_flash
from lit_opd.models.flash_pieces import pieces_of
from lit_opd.models.packed_attention import attend
from lit_opd.models.packing import pack

CPU, DOUBLE, SCALE = torch.device("cpu"), torch.float64, 0.7
SHARED = [3] * 20
TREES = {
    "a prompt and its completions": [[*SHARED, 4, 5, 6], [*SHARED, 5], [*SHARED, 6, 7]],
    "one row": [[1, 2, 3, 4, 5]],
    "one token": [[1]],
    "single tokens": [[1], [2], [3]],
    "branches of branches": [[*SHARED, *[4] * 17, 5], [*SHARED, *[4] * 17, 6, 6], [*SHARED, 7], [*SHARED[:7], 8], [9]],
    "a row within another, and twice": [[1, 2, 3], [1, 2], [1, 2, 3]],
    "filler": [[9] * 70 + [row] * 77 for row in range(7)],
}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    with emulated(monkeypatch):
        yield


def tensors(layout, heads=4, groups=2, size=8, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(layout.ids_N), number, size) for number in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_() for shape in shapes]


def outputs(call, layout, leaves, window):
    """Output and gradients at tokens that are no filler: its output is nobody's, and so is its upstream gradient."""
    out = call(*leaves, layout, SCALE, window)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=DOUBLE).to(out.dtype)
    upstream[layout.count :] = 0.0
    return [out[: layout.count], *torch.autograd.grad(out, leaves, upstream)]


def assert_same(rows, window=None, heads=4, groups=2):
    layout, _ = pack(rows, CPU)
    leaves = tensors(layout, heads, groups)
    for one, two in zip(*(outputs(call, layout, leaves, window) for call in (attend_flash, attend)), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 22, 100])
@pytest.mark.parametrize("tree", TREES)
def test_outputs_and_gradients_are_those_of_attention_by_masks(tree, window):
    assert_same(TREES[tree], window)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 2), (6, 2), (3, 1)])
def test_heads_share_keys(heads, groups):
    assert_same(TREES["branches of branches"], None, heads, groups)


short = st.lists(st.integers(0, 2), min_size=1, max_size=7)
beginnings = st.sampled_from([[], [0] * 20, [0] * 20 + [1] * 18, [0, 1] * 20])
any_rows = st.lists(st.builds(lambda first, rest: first + rest, beginnings, short), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(any_rows, st.sampled_from([None, 1, 3, 21]))
@example([[0] * 20 + [1], [0] * 20 + [2, 1], [0] * 20 + [2, 2], [0] * 20 + [3]], None)
def test_any_tree(rows, window):
    assert_same(rows, window)


def test_the_kernel_is_what_computes(monkeypatch):
    layout, _ = pack(TREES["one row"], CPU)

    def refuse(*args, **kwargs):
        raise AssertionError("attention by masks was called")

    monkeypatch.setattr(flash, "attend", refuse)
    attend_flash(*tensors(layout), layout, SCALE)
    with pytest.raises(AssertionError, match="by masks"):
        attend_flash(*tensors(layout), layout, SCALE, dropped=0.1)
    monkeypatch.setattr(flash, "DTYPES", (torch.bfloat16,))
    with pytest.raises(AssertionError, match="by masks"):
        attend_flash(*tensors(layout), layout, SCALE)


def test_keys_of_a_prompt_are_gathered_once_for_all_its_completions():
    """Eight completions of 100 prompt tokens: gathered for each they would be 800."""
    layout, _ = pack([[7] * 100 + [row] * 5 for row in range(8)], CPU)
    own, shared = pieces_of(layout)
    assert own.keys_K is None
    assert shared.keys_K.tolist() == list(range(100))
    assert shared.ends_k.tolist() == [0, 100]
    assert shared.ends_q.tolist() == [0, 40]


def test_a_window_gathers_no_more_than_it_sees():
    layout, _ = pack([[7] * 100 + [row] * 5 for row in range(8)], CPU)
    (piece,) = pieces_of(layout, window=4)
    assert piece.ends_k.diff().tolist() == [100] + [3 + 5] * 8
    assert piece.ends_q.diff().tolist() == [100] + [5] * 8


def test_pieces_are_made_once_for_all_that_read_a_layout():
    from dataclasses import replace

    layout, _ = pack(TREES["one row"], CPU)
    assert pieces_of(replace(layout)) is pieces_of(layout)


@pytest.mark.parametrize("window", [None, 5])
def test_in_half_precision_it_is_as_near_as_attention_by_masks(window):
    """Gradients of a shared beginning are summed in fp32: in bf16, 60 completions would be off by their number."""
    layout, _ = pack([[*SHARED, row, 1] for row in range(60)], CPU)
    leaves = tensors(layout, dtype=torch.bfloat16)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = outputs(attend, layout, wide, window)
    for one, two in zip(outputs(attend_flash, layout, leaves, window), exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - two).norm() < 0.02 * two.norm()
