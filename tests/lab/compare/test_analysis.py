"""Verdicts on made-up results whose truth is plain."""

import math

import numpy as np
import pytest
from scipy import stats

from lit_opd.lab.compare.analysis import Rules, analyse

KL = Rules("lower", "log", least=0.0)
SHARE = Rules("higher", least=0.0, most=1.0)
GOOD, BAD = (0.083, 0.090, 0.101), (3.2, 11.4, 6.0)


def by_seed(*values):
    return dict(enumerate(values))


def verdicts(found):
    return {row.variant: row.verdict for row in found.rows}


def test_values_that_are_far_apart_in_every_seed_are_told_apart():
    found = analyse({"low": by_seed(0.10, 0.13, 0.06), "high": by_seed(0.48, 0.53, 0.55)}, SHARE)
    assert verdicts(found) == {"high": "best", "low": "worse"}
    (contrast,) = found.contrasts
    assert (contrast.a, contrast.b) == ("low", "high")
    assert contrast.low < contrast.difference < contrast.high < 0
    assert contrast.p < 0.05


def test_a_variant_ten_times_as_bad_has_collapsed_and_leaves_the_others_their_error():
    alone = analyse({"a": by_seed(*GOOD), "b": by_seed(0.11, 0.12, 0.13)}, KL)
    found = analyse({"a": by_seed(*GOOD), "b": by_seed(0.11, 0.12, 0.13), "c": by_seed(*BAD)}, KL)
    assert verdicts(found) == {"a": "best", "b": "worse", "c": "collapsed"}
    kept = next(one for one in found.contrasts if one.a == "b")
    assert kept.p == pytest.approx(alone.contrasts[0].p)
    assert found.notes == ["`c` collapsed in 3 of 3 runs."]
    assert next(one for one in found.contrasts if one.a == "c").verdict == "collapsed"


def test_what_is_twice_as_bad_as_the_untrained_student_has_collapsed():
    values = {"a": by_seed(0.1, 0.11), "b": by_seed(0.3, 0.9)}
    known = analyse(values, Rules("lower", "log", 0.0, untrained=0.4))
    assert verdicts(known) == {"a": "best", "b": "collapsed"}
    assert known.rows[1].collapsed_runs == 1
    assert verdicts(analyse(values, Rules("lower", "log", 0.0, untrained=0.6)))["b"] != "collapsed"
    accuracies = {"a": by_seed(0.5, 0.6), "b": by_seed(0.14, 0.3)}
    assert verdicts(analyse(accuracies, Rules("higher", "raw", 0.0, 1.0, 0.3)))["b"] == "collapsed"
    assert verdicts(analyse(accuracies, Rules("higher", "raw", 0.0, 1.0, 0.2)))["b"] != "collapsed"


def test_a_scale_without_a_zero_knows_no_collapse_but_what_is_not_finite():
    values = {"a": by_seed(0.01, 0.02, -0.01), "b": by_seed(9.0, 8.0, 7.0)}
    assert "collapsed" not in verdicts(analyse(values, Rules("lower"))).values()
    lost = analyse(
        {"a": by_seed(1.0, 1.1), "b": by_seed(math.nan, 2.0), "c": by_seed(math.nan, math.inf)}, Rules("lower")
    )
    assert verdicts(lost) == {"a": "best", "b": "collapsed", "c": "collapsed"}
    assert lost.rows[-1].mean is None
    assert lost.rows[1].mean == 2.0


def test_seeds_that_differ_by_a_factor_of_two_are_no_collapse():
    rng = np.random.default_rng(0)
    found = [
        analyse({str(v): by_seed(*np.exp(0.7 * rng.standard_normal(3))) for v in range(5)}, KL) for _ in range(100)
    ]
    assert not any("collapsed" in verdicts(one).values() for one in found)


def test_a_log_scale_gives_ratios_and_geometric_means():
    values = {"a": by_seed(1.0, 4.0), "b": by_seed(3.0, 12.5)}
    found = analyse(values, KL)
    assert found.rows[0].mean == pytest.approx(2.0)
    assert found.contrasts[0].difference == pytest.approx(math.log(3.0 * 12.5 / 4.0) / 2)
    # In other units nothing changes but the means.
    scaled = analyse({name: {s: 100 * x for s, x in runs.items()} for name, runs in values.items()}, KL)
    assert scaled.contrasts[0].p == pytest.approx(found.contrasts[0].p)
    with pytest.raises(ValueError, match="not above 0"):
        analyse({"a": by_seed(0.0, 1.0)}, KL)


def test_prompts_move_a_log_ratio_as_the_jackknife_says():
    rng = np.random.default_rng(8)
    hard_P = rng.gamma(2.0, size=200)
    values = {name: {0: level * hard_P + rng.gamma(2.0, 0.1, 200)} for name, level in {"a": 0.1, "b": 0.12}.items()}
    (found,) = analyse(values, KL).contrasts
    assert found.difference == pytest.approx(np.log(values["b"][0].mean() / values["a"][0].mean()))
    left_out = [np.log(np.delete(values["b"][0], p).mean() / np.delete(values["a"][0], p).mean()) for p in range(200)]
    error = np.sqrt(199 * np.var(left_out))
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 199) * error, rel=0.01)
    # In other units it is the same.
    scaled = analyse({name: {0: 100 * runs[0]} for name, runs in values.items()}, KL).contrasts[0]
    assert scaled.low == pytest.approx(found.low)


def test_no_interval_leaves_what_is_possible():
    found = analyse({"a": by_seed(0.97, 1.0), "b": by_seed(0.0, 0.03), "c": by_seed(0.5, 0.7)}, SHARE)
    assert all(0 <= row.low <= row.mean <= row.high <= 1 for row in found.rows)
    assert all(-1 <= one.low <= one.high <= 1 for one in found.contrasts)
    kl = analyse({"a": by_seed(0.01, 0.4), "b": by_seed(0.02, 0.9)}, KL)
    assert all(0 < row.low <= row.mean <= row.high for row in kl.rows)


def test_a_share_that_is_zero_everywhere_has_an_interval_over_prompts():
    found = analyse({"a": {s: np.zeros(50) for s in range(3)}, "b": {s: np.ones(50) for s in range(3)}}, SHARE)
    zero = found.rows[-1]
    assert (zero.low, zero.verdict) == (0.0, "collapsed")
    assert zero.high == pytest.approx(0.0714, abs=1e-3)  # Wilson's, of 0 in 50


def test_the_contrasts_are_those_that_are_asked():
    rng = np.random.default_rng(3)
    values = {str(v): by_seed(*(level + 0.1 * rng.standard_normal(4))) for v, level in enumerate((1, 2, 3, 1.02))}
    to_best = analyse(values, Rules("lower"))
    assert {one.b for one in to_best.contrasts} == {to_best.rows[0].variant}
    baseline = analyse(values, Rules("lower", contrasts="1"))
    assert [(one.a, one.verdict) for one in baseline.contrasts] == [
        (to_best.rows[0].variant, "better"), (to_best.rows[1].variant, "better"), ("2", "worse"),
    ]  # fmt: skip
    assert verdicts(baseline) == verdicts(to_best)
    every = analyse(values, Rules("lower", contrasts="all"))
    assert len(every.contrasts) == 6
    assert verdicts(every) == verdicts(to_best)
    # More contrasts, less power for each.
    wide = {(one.a, one.b): one.high - one.low for one in every.contrasts}
    assert all(wide[one.a, one.b] >= one.high - one.low for one in to_best.contrasts)


def test_with_all_contrasts_a_collapsed_variant_is_compared_with_every_other_by_its_own_error():
    standing = {"a": by_seed(*GOOD), "b": by_seed(0.21, 0.22, 0.23)}
    fallen = {"c": by_seed(*BAD), "d": by_seed(90.0, 5.0, 400.0)}
    found = analyse(standing | fallen, Rules("lower", "log", 0.0, contrasts="all"))
    by_pair = {(one.a, one.b): one for one in found.contrasts}
    assert by_pair.keys() == {("b", "a"), ("c", "a"), ("c", "b"), ("d", "a"), ("d", "b"), ("d", "c")}
    assert {pair for pair, one in by_pair.items() if one.verdict == "collapsed"} == by_pair.keys() - {("b", "a")}
    # The wider error of d is its own, and leaves those that stand as they are.
    assert all(by_pair["d", name].high - by_pair["d", name].low > 3 for name in "ab")
    alone = analyse(standing, Rules("lower", "log", 0.0, contrasts="all"))
    assert by_pair["b", "a"].p == pytest.approx(alone.contrasts[0].p)


def test_a_baseline_that_collapsed_is_still_compared_with():
    found = analyse({"a": by_seed(*GOOD), "b": by_seed(*BAD)}, Rules("lower", "log", 0.0, contrasts="b"))
    assert [(one.a, one.b, one.verdict) for one in found.contrasts] == [("a", "b", "better")]


def test_without_a_direction_nothing_is_ranked():
    found = analyse({"a": by_seed(1.0, 2.0), "b": by_seed(3.0, 4.0)}, Rules(None))
    assert found.contrasts == []
    assert verdicts(found) == {"a": None, "b": None}


def test_what_cannot_be_tested_is_not_told():
    for values in ({"a": by_seed(1.0), "b": by_seed(2.0)}, {"a": by_seed(1.0, 1.0), "b": by_seed(2.0, 2.0)}):
        found = analyse(values, Rules("lower"))
        assert verdicts(found) == {"a": "best", "b": "equal"}
        (contrast,) = found.contrasts
        assert (contrast.low, contrast.high, contrast.p) == (None, None, 1.0)


def test_one_seed_is_tested_over_prompts_and_says_so():
    rng = np.random.default_rng(4)
    hard = rng.standard_normal(60)
    values = {name: {0: hard + level + 0.1 * rng.standard_normal(60)} for name, level in {"a": 0.0, "b": 0.3}.items()}
    found = analyse(values, Rules("lower"))
    assert verdicts(found) == {"a": "best", "b": "worse"}
    assert found.notes == ["One seed of each: this says nothing of other seeds."]
