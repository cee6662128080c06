"""The histogram of log-ratios against numpy over all tokens at once."""

import math

import numpy as np
import pytest
import torch

from lit_opd.measures.histogram import LogRatioHistogram


def histogram(*parts):
    metric = LogRatioHistogram()
    for part in parts:
        metric.update(torch.tensor(part))
    return metric.compute()


@pytest.fixture
def heavy():
    """Log-ratios with a heavy tail, in the way that they come, some beyond the bins."""
    rng = np.random.default_rng(3)
    values = rng.standard_t(1.5, 20_000) * np.where(rng.random(20_000) < 0.5, 0.02, 2.0)
    assert values.min() < -100
    assert values.max() > 100
    return values


def test_every_token_is_counted_in_its_bin(heavy):
    found = histogram(heavy[:7], heavy[7:7], heavy[7:])
    counts, _ = np.histogram(heavy, found.edges)
    assert found.counts[1:-1].tolist() == counts.tolist()
    assert found.counts[0] == (heavy < found.edges[0]).sum() > 0
    assert found.counts[-1] == (heavy >= found.edges[-1]).sum() > 0
    assert found.counts.sum() == len(heavy)
    assert found.totals.sum() == pytest.approx(np.abs(heavy).sum())
    assert (found.least, found.largest) == (heavy.min(), heavy.max())


def test_bins_are_symmetric_begin_at_zero_and_are_finest_there():
    edges = LogRatioHistogram.edges()
    np.testing.assert_array_equal(edges, -edges[::-1])
    assert edges[len(edges) // 2] == 0
    assert edges[-1] == pytest.approx(100)
    widths = np.diff(edges[len(edges) // 2 :])
    assert (np.diff(widths) > 0).all()
    assert widths[0] < 1e-3
    assert (widths / edges[len(edges) // 2 + 1 :]).max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0])
def test_quantiles_are_numpy_s_to_within_a_bin(heavy, share):
    for values in (heavy, heavy[:300] / 100, np.full(5, 0.5), np.array([-3.0, 60.0])):
        found = histogram(values)
        exact = np.quantile(values, share, method="inverted_cdf")
        ends = np.concatenate([[-math.inf], found.edges, [math.inf]])
        place = np.searchsorted(found.edges, exact, side="right")
        low, high = max(ends[place], values.min()), min(ends[place + 1], values.max())
        assert low - 1e-9 <= found.quantile(share) <= high + 1e-9


def test_within_a_bin_quantiles_are_interpolated():
    """In the middle of tokens too: a bin's are taken as evenly spread over it."""
    edges = LogRatioHistogram.edges()
    low, high = edges[250:252]
    found = histogram(np.concatenate([np.full(300, -3.0), np.linspace(low, high, 1001)[:-1], np.full(700, 50.0)]))
    for share in (0.2, 0.4, 0.6):
        assert found.quantile(share) == pytest.approx(low + (2000 * share - 300) / 1000 * (high - low), rel=1e-6)


@pytest.mark.parametrize("share", [0.005, 0.01, 0.3, 1.0])
def test_the_share_of_the_largest_is_that_of_sorted_tokens(heavy, share):
    size = np.sort(np.abs(heavy))[::-1]
    exact = size[: round(share * len(size))].sum() / size.sum()
    assert histogram(heavy).top_share(share) == pytest.approx(exact, rel=0.02)


def test_equal_models_and_no_tokens():
    """A log-ratio of zero has a bin; of nothing there is no quantile and no share."""
    equal, none = histogram(np.zeros(10)), histogram(np.zeros(0))
    assert equal.counts[len(equal.counts) // 2] == 10
    assert equal.quantile(0.5) == 0
    assert math.isnan(equal.top_share())
    assert math.isnan(none.quantile(0.5))
    assert math.isnan(none.top_share())


def test_a_module_in_bf16_counts_as_exactly(heavy):
    """Lightning casts the states under bf16-true, which cannot count to 257, and makes it torch's default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        bins = LogRatioHistogram().to(torch.bfloat16)
        for half in np.split(heavy, 2):
            bins.update(torch.tensor(half))
        assert not LogRatioHistogram().to(torch.bfloat16).compute().counts.any()
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(bins.compute().counts, histogram(heavy).counts)
    assert bins.compute().quantile(0.3) == histogram(heavy).quantile(0.3)
