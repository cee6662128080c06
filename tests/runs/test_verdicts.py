import pytest

from lit_opd.runs.verdicts import FAIL, PASS, WARN, conclude, graded, worst


@pytest.mark.parametrize(("value", "verdict"), [(0.0, PASS), (0.99, PASS), (1.0, WARN), (1.99, WARN), (2.0, FAIL),
                                                (float("nan"), FAIL)])  # fmt: skip
def test_a_number_is_graded_by_two_limits(value, verdict):
    assert graded(value, 1.0, 2.0) == verdict


@pytest.mark.parametrize(("value", "verdict"), [(2.0, PASS), (1.01, PASS), (0.99, WARN), (0.51, WARN), (0.49, FAIL),
                                                (float("nan"), FAIL)])  # fmt: skip
def test_where_small_numbers_are_bad_the_limits_come_in_falling_order(value, verdict):
    assert graded(value, 1.0, 0.5) == verdict


def test_without_a_second_limit_only_what_is_no_number_fails():
    assert graded(1e30, 1.0) == WARN
    assert graded(float("nan"), 1.0) == FAIL


def test_the_worst_verdict_counts():
    assert worst([]) == PASS
    assert worst([PASS, WARN, PASS]) == WARN
    assert worst([FAIL, WARN]) == FAIL


def test_what_passes_needs_no_fix():
    assert conclude(WARN, "found", "fix", size=1.0) == (WARN, "found", "fix", {"size": 1.0})
    assert conclude(PASS, "found", "fix", size=1.0) == (PASS, "found", "", {"size": 1.0})
