import pytest

from lit_opd.lab.audit.findings import FAIL, PASS, WARN, Finding, graded, worst


@pytest.mark.parametrize(("value", "verdict"), [(0.0, PASS), (0.99, PASS), (1.0, WARN), (1.99, WARN), (2.0, FAIL),
                                                (float("nan"), FAIL)])  # fmt: skip
def test_a_number_is_graded_by_two_limits(value, verdict):
    assert graded(value, 1.0, 2.0) == verdict


def test_without_a_second_limit_only_what_is_no_number_fails():
    assert graded(1e30, 1.0) == WARN
    assert graded(float("nan"), 1.0) == FAIL


def test_the_worst_verdict_counts():
    findings = {verdict: Finding("item", verdict, "") for verdict in (PASS, WARN, FAIL)}
    assert worst([]) == PASS
    assert worst([findings[PASS], findings[WARN], findings[PASS]]) == WARN
    assert worst([findings[FAIL], findings[WARN]]) == FAIL
