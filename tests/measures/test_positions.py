"""Curves and histogram of an evaluation against plain numpy over all tokens at once."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from references import rollout_from, written_by

from lit_opd.measures.intervals import over_prompts
from lit_opd.measures.positions import POSITION_VALUES, SUPPORT_VALUES, PositionMeans, TokenProfile
from lit_opd.types import FinishReason, SamplingLaw

LENGTH = 7


def make_rollout(mask_BT, prompts):
    rows, length = mask_BT.shape
    none = torch.zeros(rows, length)
    return rollout_from(none[:, :1].long(), none[:, :1].bool(), none.long(), mask_BT, mask_BT, none,
                   torch.full((rows,), FinishReason.STOP), SamplingLaw(), prompts)  # fmt: skip


def make_tokens(rng, prompts=9, completions=3, length=LENGTH):
    """Values [Q, B, T] that completions of a prompt share in part, the mask, and the prompt of each row."""
    rows = prompts * completions
    ends = rng.integers(1, length + 1, rows)
    mask = np.arange(length) < ends[:, None]
    effects = np.repeat(rng.normal(0, 1, (len(POSITION_VALUES), prompts, length)), completions, axis=1)
    values = (effects + rng.normal(0, 1, (len(POSITION_VALUES), rows, length))) * mask
    return values, mask, np.repeat(np.arange(prompts), completions)


def feed(profile, values, mask, group):
    names = {name: torch.tensor(table) for name, table in zip(POSITION_VALUES, values, strict=True)}
    profile.update(names, make_rollout(torch.tensor(mask), torch.tensor(group)))


@pytest.fixture
def tokens():
    return make_tokens(np.random.default_rng(0))


def batches(tokens, *choices):
    """The chosen prompts of each batch, numbered anew, and cut at the batch's longest completion."""
    values, mask, group = tokens
    for chosen in choices:
        rows = np.concatenate([np.flatnonzero(group == number) for number in chosen])
        width = int(mask[rows].sum(1).max())
        yield values[:, rows, :width], mask[rows, :width], np.repeat(np.arange(len(chosen)), 3)


@pytest.mark.parametrize("order", [[range(9)], [[0, 1, 2, 3], [4], [5, 6, 7, 8]], [[8, 2], [7, 0, 1, 6], [5, 4, 3]]])
def test_curves_are_numpy_s_over_all_tokens_in_whatever_batches_they_come(tokens, order):
    values, mask, group = tokens
    profile = TokenProfile(LENGTH + 2)
    for batch in batches(tokens, *order):
        feed(profile, *batch)
    found = profile.compute().curves
    for t in range(LENGTH):
        alive = mask[:, t]
        kept = values[:, alive, t]
        assert found.counts[t] == alive.sum()
        assert found.prompts[t] == len(set(group[alive]))
        for q, name in enumerate(POSITION_VALUES):
            assert found.means[name][t] == pytest.approx(kept[q].mean())
    for table in (found.means, found.lows, found.highs):
        assert np.isnan(table["reverse_kl"][LENGTH:]).all()
    assert not found.counts[LENGTH:].any()


def test_the_band_takes_the_prompt_as_the_unit(tokens):
    """Position by position it is the interval of `over_prompts`, here and by the ratio's residuals."""
    values, mask, group = tokens
    profile = TokenProfile(LENGTH)
    feed(profile, *tokens)
    found = profile.compute().curves
    for t in range(LENGTH):
        present = [number for number in range(9) if mask[group == number, t].any()]
        sums = np.array([values[0, group == number, t].sum() for number in present])
        counts = np.array([mask[group == number, t].sum() for number in present], dtype=float)
        band = found.means["reverse_kl"][t], found.lows["reverse_kl"][t], found.highs["reverse_kl"][t]
        assert band == pytest.approx(over_prompts(sums, counts))
        residuals = sums - sums.sum() / counts.sum() * counts
        m = len(present)
        half = scipy.stats.t.ppf(0.975, m - 1) * math.sqrt(m / (m - 1) * (residuals**2).sum()) / counts.sum()
        assert found.highs["reverse_kl"][t] - found.means["reverse_kl"][t] == pytest.approx(half)


@pytest.mark.parametrize("width", [2, 3, 7])
def test_positions_together_are_one_point(tokens, width):
    """Its tokens are those of its positions, and its band that of prompts: theirs hang together."""
    values, mask, group = tokens
    metric = PositionMeans(["reverse_kl"], LENGTH, width)
    for part, counted, prompts in batches(tokens, [2, 0, 5], [1, 8], [3, 4, 6, 7]):
        metric.update({"reverse_kl": torch.tensor(part[0])}, torch.tensor(counted), torch.tensor(prompts))
    found = metric.compute()
    assert found.starts.tolist() == [*range(0, LENGTH, width), LENGTH]
    for number, start in enumerate(range(0, LENGTH, width)):
        part = slice(start, start + width)
        kept = values[0][:, part][mask[:, part]]
        prompts = [k for k in range(9) if mask[group == k, part].any()]
        alone = over_prompts([values[0][group == k, part].sum() for k in prompts],
                             [mask[group == k, part].sum() for k in prompts])  # fmt: skip
        band = (found.means["reverse_kl"][number], found.lows["reverse_kl"][number], found.highs["reverse_kl"][number])
        assert band == pytest.approx(alone)
        assert found.counts[number] == len(kept)
        assert found.prompts[number] == len(prompts)
        assert found.middles[number] == np.arange(1, LENGTH + 1)[part].mean()


def test_one_prompt_has_no_band():
    profile = TokenProfile(LENGTH)
    feed(profile, *make_tokens(np.random.default_rng(1), prompts=1))
    found = profile.compute().curves
    assert found.lows["reverse_kl"][0] == -math.inf
    assert found.highs["reverse_kl"][0] == math.inf
    assert math.isfinite(found.means["reverse_kl"][0])


def test_merged_metrics_are_one(tokens):
    """Of two processes, and of one that saw no prompt; everything is forgotten after."""
    parts = [TokenProfile(LENGTH) for _ in range(3)]
    for part, batch in zip(parts, batches(tokens, [3, 1, 8, 6], [0, 2, 7, 5, 4]), strict=False):
        feed(part, *batch)
    whole = TokenProfile(LENGTH)
    feed(whole, *tokens)
    for other in parts[1:]:
        parts[0].curves.merge_state(other.curves)
        parts[0].log_ratios.merge_state(other.log_ratios)
    merged, expected = parts[0].compute(), whole.compute()
    for one, two in zip(merged.curves, expected.curves, strict=True):
        np.testing.assert_equal(
            *([*map(np.asarray, x.values())] if isinstance(x, dict) else x for x in rounded(one, two))
        )
    np.testing.assert_array_equal(merged.log_ratios.counts, expected.log_ratios.counts)
    assert merged.log_ratios[3:] == expected.log_ratios[3:]
    assert not whole.log_ratios.counts.any()
    assert not whole.curves.moments.any()


def rounded(*tables):
    """Sums in another order differ in the last digits."""
    return [{name: x.round(10) for name, x in t.items()} if isinstance(t, dict) else t for t in tables]


def test_quarters_and_supports_are_means_over_their_tokens(tokens):
    values, mask, _ = tokens
    profile = TokenProfile(10)  # quarters begin at 0, 3, 5 and 8; the last has no token
    feed(profile, *tokens)
    found = profile.compute().curves.summary()
    for q, name in enumerate(POSITION_VALUES):
        for number, (start, stop) in enumerate([(0, 3), (3, 5), (5, 8)], start=1):
            kept = values[q][:, start:stop][mask[:, start:stop]]
            assert found[f"position/{name}_q{number}"] == pytest.approx(kept.mean())
        if name in SUPPORT_VALUES:
            assert found[f"support/{name}"] == pytest.approx(values[q][mask].mean())
    assert len(found) == 3 * len(POSITION_VALUES) + 3


def test_a_value_that_exists_nowhere_is_not_summed_up(tokens):
    values, mask, group = tokens
    values[POSITION_VALUES.index("stop_log_ratio")] = np.where(mask, np.nan, 0)
    profile = TokenProfile(LENGTH)
    feed(profile, values, mask, group)
    found = profile.compute().curves.summary()
    assert found.keys() == {
        f"position/{n}_q{i}" for n in POSITION_VALUES if n != "stop_log_ratio" for i in (1, 2, 3, 4)
    } | {f"support/{name}" for name in SUPPORT_VALUES}


def test_only_own_tokens_are_in_the_histogram(tokens):
    values, mask, group = tokens
    rollout = make_rollout(torch.tensor(mask), torch.tensor(group))
    wrote = torch.arange(len(mask)) % 2 == 0
    profile = TokenProfile(LENGTH)
    named = {name: torch.tensor(table) for name, table in zip(POSITION_VALUES, values, strict=True)}
    profile.update(named, written_by(rollout, wrote))
    found = profile.compute()
    assert found.log_ratios.counts.sum() == mask[::2].sum()
    assert found.curves.counts.sum() == mask.sum()


def test_a_module_in_bf16_counts_as_exactly():
    """Lightning casts the states under bf16-true, which cannot count to 257, and makes it torch's default."""
    values = np.random.default_rng(3).standard_t(1.5, 20_000)
    torch.set_default_dtype(torch.bfloat16)
    try:
        means = PositionMeans(["x"], 1).to(torch.bfloat16)
        for half in np.split(values, 2):
            x = torch.tensor(half)[:, None]
            means.update({"x": x}, torch.ones_like(x, dtype=torch.bool), torch.arange(len(x)))
        found, nothing = means.compute(), PositionMeans(["x"], 1).bfloat16()
        assert not nothing.compute().counts.any()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.counts.tolist() == found.prompts.tolist() == [len(values)]
    assert found.means["x"][0] == pytest.approx(values.mean(), rel=1e-12)


def test_what_is_missing_is_not_measured(tokens):
    """A teacher that says nothing of whole distributions leaves no curve of them, and no number to log."""
    values, mask, group = tokens
    metric = PositionMeans(["reverse_kl", "log_ratio"], LENGTH)
    metric.update({"log_ratio": torch.tensor(values[1])}, torch.tensor(mask), torch.tensor(group))
    found = metric.compute()
    assert np.isnan(found.means["reverse_kl"]).all()
    assert {name.partition("/")[2] for name in found.summary()} == {f"log_ratio_q{i}" for i in (1, 2, 3, 4)}
    assert found.counts[0] == 27
