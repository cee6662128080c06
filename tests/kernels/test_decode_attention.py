"""The attention of one new token a row, against plain softmax over the columns that the row has."""

import pytest
import torch

decode_attention = pytest.importorskip("lit_opd.kernels.decode_attention", reason="it needs triton").decode_attention

pytestmark = pytest.mark.usefixtures("interpreted")

SHAPES = {  # rows, heads, groups, columns, size
    "grouped": (3, 6, 2, 130, 24),
    "one group": (2, 4, 1, 70, 16),
    "no groups, few columns": (2, 2, 2, 5, 32),
}


def expected(query, keys, values, first, column, scale, window):
    place = torch.arange(keys.shape[2])
    begin = first if window is None else torch.maximum(first, torch.tensor(column + 1 - window))
    seen = (place >= begin[:, None]) & (place <= column)
    keys, values = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    scores = (query.double()[:, :, None] @ keys.transpose(-1, -2))[:, :, 0] * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights[:, :, None] @ values)[:, :, 0]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_row_attends_to_its_own_columns(shape, window):
    rows, heads, groups, columns, size = shape
    torch.manual_seed(0)
    cache = torch.randn(2, rows, groups, columns, size)
    query = torch.randn(rows, 2 * heads, size)[:, :heads]  # part of a joined product: rows are not adjacent
    first = torch.arange(rows) * 2
    for column in (2 * rows, columns - 1) if columns > 2 * rows else (columns - 1,):
        cache[:, :, :, column + 1 :] = torch.nan  # nobody may read what is not written yet
        found = decode_attention(query, *cache, first, torch.tensor(column), 0.3, window)
        assert (found - expected(query, *cache.nan_to_num(9), first, column, 0.3, window)).abs().max() < 1e-5
        cache = torch.randn(2, rows, groups, columns, size)


def test_large_scores_stay_finite_in_half_precision():
    # Not bf16, which Triton's interpreter multiplies as whole numbers.
    torch.manual_seed(0)
    cache = torch.randn(2, 1, 1, 64, 16).half()
    query = 100 * torch.randn(1, 2, 16).half()
    found = decode_attention(query, *cache, torch.tensor([0]), torch.tensor(63), 1.0)
    off = (found.double() - expected(query, *cache, torch.tensor([0]), 63, 1.0, None)).abs().max()
    assert off < 0.02
