"""The loss of an optimizer step does not depend on how its rows were cut up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.functional import masked_mean, token_weights

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")


def batch(seed, rows=6, length=5):
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(rows, length, generator=generator) < 0.5
    mask_BT[0] = False  # a row without any counted token
    mask_BT[1, 0] = True
    return torch.randn(rows, length, generator=generator, dtype=torch.float64), mask_BT


def by_definition(loss_BT, mask_BT, aggregation):
    rows = [loss[mask] for loss, mask in zip(loss_BT, mask_BT, strict=True) if mask.any()]
    if aggregation == "token_mean":
        return torch.cat(rows).mean()
    per_row = [row.mean() if aggregation == "sequence_mean" else row.sum() for row in rows]
    return torch.stack(per_row).mean()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(AGGREGATIONS), st.integers(0, 1000), st.lists(st.integers(1, 5), max_size=4, unique=True))
def test_any_cut_into_micro_batches_gives_the_definition(aggregation, seed, cuts):
    loss_BT, mask_BT = batch(seed)
    tokens, sequences = mask_BT.sum(), mask_BT.any(1).sum()
    total = 0.0
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 6], strict=True):
        part = mask_BT[start:stop]
        # A micro-batch is trimmed to its own longest row.
        longest = int(part.any(0).nonzero().max()) + 1 if part.any() else 0
        weights = token_weights(part[:, :longest], aggregation, tokens, sequences)
        total += (weights.double() * loss_BT[start:stop, :longest]).sum()
    torch.testing.assert_close(total, by_definition(loss_BT, mask_BT, aggregation), rtol=0, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_counted_weighs_nothing(aggregation):
    weights = token_weights(torch.zeros(2, 3, dtype=torch.bool), aggregation, torch.tensor(0), torch.tensor(0))
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0.0] * 3] * 2


def test_masked_positions_weigh_nothing():
    _, mask_BT = batch(3)
    for aggregation in AGGREGATIONS:
        weights = token_weights(mask_BT, aggregation, mask_BT.sum(), mask_BT.any(1).sum())
        assert ((weights > 0) == mask_BT).all()


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="token_mean"):
        token_weights(torch.ones(1, 1, dtype=torch.bool), "mean", torch.tensor(1), torch.tensor(1))


def test_masked_mean():
    values = torch.tensor([[1.0, torch.nan], [3.0, torch.inf]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_mean(values, mask) == 2
    assert masked_mean(values, torch.zeros_like(mask)) == 0
    # 257 is no bf16 number: the mean is taken in fp32 (and compared outside bf16, where 257 == 256).
    assert masked_mean(torch.tensor([256.0, 258.0]).bfloat16(), torch.ones(2, dtype=torch.bool)).item() == 257
