"""Corrections for several contrasts, against scipy's studentized range, published tables and simulation."""

import numpy as np
import pytest
from scipy import stats

from lit_opd.lab.compare.simultaneous import (
    Statistic,
    baseline_tail,
    critical,
    range_tail,
    shifted_tail,
    step_down,
    t_tail,
)


@pytest.mark.parametrize("means", [2, 5, 12])
@pytest.mark.parametrize("df", [1.0, 4.0, 16.5, 400.0])
def test_the_best_of_k_is_judged_by_the_studentized_range(means, df):
    for t in (0.5, 2.0, 4.0, 20.0):
        expected = stats.studentized_range.sf(t * 2**0.5, means, df)
        assert range_tail(t, means, df) == pytest.approx(expected, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize(("contrasts", "df", "published"), [(2, 10.0, 2.57), (4, 20.0, 2.65), (5, 10.0, 2.99)])
def test_a_baseline_is_judged_by_dunnetts_table(contrasts, df, published):
    """Two-sided, 5 %: Dunnett, Biometrics 20 (1964), table II."""
    assert critical(baseline_tail, contrasts, df) == pytest.approx(published, abs=0.006)


def test_a_difference_of_so_many_standard_errors_is_a_noncentral_t():
    for t, shift, df in ((2.0, 1.5, 4.0), (3.5, 4.9, 8.0)):
        expected = stats.nct.sf(t, df, shift) + stats.nct.cdf(-t, df, shift)
        assert shifted_tail(t, shift, df) == pytest.approx(expected, abs=1e-6)


def test_steps_go_from_the_farthest_to_the_first_that_is_not_told():
    found = step_down([Statistic(t, 8.0) for t in (2.9, 9.0, 1.0, 3.3)], range_tail, smallest=2)
    assert found[1].p == range_tail(9.0, 5, 8.0)
    assert found[3].p == range_tail(3.3, 4, 8.0)
    assert found[0].p == range_tail(2.9, 3, 8.0)
    assert found[2].p == range_tail(1.0, 2, 8.0)
    assert [one.told for one in found] == [True, True, False, True]
    # One step alone would not find it.
    assert range_tail(3.3, 5, 8.0) > 0.05
    # Intervals hold zero exactly where nothing is told.
    assert [one.critical < t for one, t in zip(found, (2.9, 9.0, 1.0, 3.3), strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip


def test_after_a_step_that_tells_nothing_no_later_one_does():
    first, second = step_down([Statistic(3.4, 8.0), Statistic(3.3, 8.0)], lambda t, size, df: t_tail(t, size, df) * 10 * (size == 2) + t_tail(t, size, df), smallest=1)  # noqa: E501  # fmt: skip
    assert not first.told
    assert not second.told
    assert second.p >= first.p
    assert second.critical >= 3.3


def test_degrees_of_freedom_of_their_own_do_not_make_an_interval_leave_zero_out():
    verdicts = step_down([Statistic(2.6, 3.0), Statistic(2.5, 4000.0)], range_tail, smallest=2)
    told, widths = [one.told for one in verdicts], np.array([one.critical for one in verdicts])
    assert [width < t for width, t in zip(widths, (2.6, 2.5), strict=True)] == told
