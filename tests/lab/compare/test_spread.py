"""How far means move with other seeds and prompts, against formulas of textbooks and scipy."""

import numpy as np
import pytest
from scipy import stats

from lit_opd.lab.compare.spread import spread_of


def runs_of(values_VS):
    return {f"v{v}": {s: float(x) for s, x in enumerate(row)} for v, row in enumerate(values_VS)}


def without_prompts(runs):
    return {name: {seed: np.zeros(1) for seed in by_seed} for name, by_seed in runs.items()}


def spread(values_VS, apart=()):
    runs = runs_of(values_VS)
    return spread_of(runs, without_prompts(runs), apart)


def test_two_variants_are_paired_by_seed():
    values = np.random.default_rng(0).standard_normal((2, 6)) + 5 * np.random.default_rng(1).standard_normal(6)
    found = spread(values).difference_of("v0", "v1")
    expected = stats.ttest_rel(*values)
    assert found.value / found.variance**0.5 == pytest.approx(expected.statistic)
    assert found.df == expected.df


def test_the_error_is_that_of_a_table_of_variants_and_seeds():
    """The analysis of variance of two crossed factors without replication, by its sums of squares."""
    values = np.random.default_rng(2).standard_normal((4, 5)) + np.arange(4)[:, None] + 3 * np.arange(5)
    total = ((values - values.mean()) ** 2).sum()
    rows, columns = (
        5 * ((values.mean(1) - values.mean()) ** 2).sum(),
        4 * ((values.mean(0) - values.mean()) ** 2).sum(),
    )
    found = spread(values)
    assert found.error.df == 12
    assert found.error.variance == pytest.approx((total - rows - columns) / 12)
    assert found.difference_of("v3", "v0").variance == pytest.approx(2 / 5 * found.error.variance)
    # A mean also answers for what a seed does to all variants.
    within = ((values - values.mean(1, keepdims=True)) ** 2).sum() / 16
    assert found.mean_of("v0").variance == pytest.approx(within / 5)
    assert 4 <= found.mean_of("v0").df < 16


def test_a_missing_run_is_made_up_for_by_its_seed():
    values = np.array([[1.0, 2.0, 9.0], [1.5, 2.6, 9.4], [0.9, 2.2, 9.1]])
    runs = runs_of(values)
    del runs["v0"][2]
    found = spread_of(runs, without_prompts(runs))
    assert found.error.df == 3
    # By hand: the two other variants tell that the third seed adds about seven.
    assert found.means["v0"] == pytest.approx(4.0, abs=0.3)
    assert found.difference_of("v0", "v1").variance > found.difference_of("v1", "v2").variance


def test_variants_without_a_common_seed_are_compared_by_welch():
    runs = {"a": {0: 1.0, 1: 1.2, 2: 0.9}, "b": {3: 2.0, 4: 2.4, 5: 1.9}}
    found = spread_of(runs, without_prompts(runs)).difference_of("b", "a")
    expected = stats.ttest_ind(list(runs["b"].values()), list(runs["a"].values()))
    assert found.value / found.variance**0.5 == pytest.approx(expected.statistic)


def test_a_variant_with_a_larger_error_keeps_its_own():
    values = np.random.default_rng(5).standard_normal((5, 5))
    values[2] *= 40
    found = spread(values)
    assert list(found.own) == ["v2"]
    assert found.own["v2"] > 5
    assert found.error.df == 12
    pair = found.difference_of("v2", "v0")
    assert pair.variance == pytest.approx(values[2].var(ddof=1) / 5 + found.total.variance / 5)
    assert pair.df < 5


def test_the_test_for_a_larger_error_keeps_its_level():
    """One in forty tables of equal errors has an outlier, as the F distribution promises."""
    rng = np.random.default_rng(0)
    outliers = sum(bool(spread(rng.standard_normal((4, 4)) + rng.standard_normal(4)).own) for _ in range(600))
    assert 0.012 < outliers / 600 < 0.045


def test_collapsed_variants_change_no_error_of_the_others():
    values = np.random.default_rng(6).standard_normal((4, 4)) + np.array([0, 0, 0, 50])[:, None]
    others = spread(values[:3])
    wide, narrow = values.copy(), values.copy()
    wide[3] *= np.array([1, 3, 9, 27])
    narrow[3] = 50
    for array, own in ((values, []), (wide, ["v3"]), (narrow, [])):
        found = spread(array, apart=["v3"])
        assert (found.error, found.total) == (others.error, others.total)
        assert list(found.own) == own
    # A collapsed variant is held to the error of the others where its own is not wider, be it zero.
    assert found.difference_of("v3", "v0").variance == pytest.approx(2 * others.total.variance / 4)


def test_prompts_add_what_seeds_have_not_counted():
    rng = np.random.default_rng(7)
    values_SP = rng.standard_normal((4, 200)) + 3 * rng.standard_normal(200)
    runs = {"a": {s: float(x.mean()) for s, x in enumerate(values_SP)}, "b": dict.fromkeys(range(4), 0.0)}
    influence = {"a": {s: x - x.mean() for s, x in enumerate(values_SP)}, "b": {s: np.zeros(200) for s in range(4)}}
    found = spread_of(runs, influence).difference_of("a", "b")
    differences = np.array([runs["a"][s] for s in range(4)])
    seeds = differences.var(ddof=1) / 4
    rest = values_SP - values_SP.mean(0) - values_SP.mean(1, keepdims=True) + values_SP.mean()
    prompts = (values_SP.mean(0).var(ddof=1) - (rest**2).sum() / (3 * 199) / 4) / 200
    assert found.variance == pytest.approx(seeds + prompts)
    assert found.variance > 5 * seeds


def test_seeds_that_agree_by_chance_do_not_hide_that_prompts_vary():
    """Values that are 0 or 1 may give both seeds the same mean."""
    values_SP = np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    runs = {"a": {0: 0.5, 1: 0.5}}
    found = spread_of(runs, {"a": {s: x - 0.5 for s, x in enumerate(values_SP)}}).mean_of("a")
    assert found.variance == pytest.approx(values_SP.mean(0).var(ddof=1) / 4)
    assert found.df == 3


def test_equal_values_leave_no_error():
    found = spread([[1e6 + 0.1] * 3, [2.0] * 3])
    assert found.error.variance == 0
    assert found.difference_of("v0", "v1").variance == 0
