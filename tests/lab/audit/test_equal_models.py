import pytest

from lit_opd.lab.audit.equal_models import null_test
from lit_opd.types import Estimate


@pytest.mark.parametrize("estimator", ["full_vocab", "token", "teacher_topk"])
def test_estimators_that_promise_it_have_no_gradient_between_equal_models(make_evidence, estimator):
    kwargs = {"k": 4} if estimator == "teacher_topk" else {}
    found = null_test(make_evidence(estimator=estimator, **kwargs))
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.numbers["floor"] < 1e-4


def test_a_broken_promise_fails(make_evidence, register):
    register("lifts", lambda ratio, logps: (ratio - 1) * logps, at_equal="sample")
    found = null_test(make_evidence(estimator="lifts"))
    assert found.verdict == "fail"
    assert found.numbers["floor"] == pytest.approx(1.0), "the unit is one nat a token"
    assert found.found == "with the student as its own teacher the gradient is 1.0e+00 times that of one nat a token"
    assert "correct the estimator" in found.fix


def test_a_small_floor_is_a_warning(make_evidence, register):
    register("tilts", lambda ratio, logps: (ratio + 0.05) * logps, at_equal="sample")
    found = null_test(make_evidence(estimator="tilts"))
    assert (found.verdict, found.numbers["floor"]) == ("warn", pytest.approx(0.05, rel=0.01))


def test_a_promise_in_expectation_allows_noise(make_evidence, register):
    register("noisy", lambda ratio, logps: (ratio + 1) * logps, at_equal="expectation")
    found = null_test(make_evidence(estimator="noisy"))
    assert found.verdict == "pass"
    assert found.numbers["p_value"] >= 0.01
    assert "zero in expectation only" in found.found


def test_a_promise_in_expectation_does_not_allow_a_direction(make_evidence, register):
    register("sharpens", lambda ratio, logps: -logps * logps.exp(), at_equal="expectation")
    found = null_test(make_evidence(estimator="sharpens"))
    assert found.verdict in ("warn", "fail")
    assert found.fix == "Check it: python -m lit_opd check NAME."


def test_what_promises_nothing_is_only_told(make_evidence, register):
    register("never", lambda ratio, logps: (ratio - 1) * logps, at_equal="never")
    found = null_test(make_evidence(estimator="never"))
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found.endswith("'never' promises nothing there")


def test_a_function_that_is_not_registered_is_only_told(make_evidence):
    def mine(tokens):
        return Estimate(tokens.student_logps_BT, tokens.teacher_logps_BT)

    found = null_test(make_evidence(estimator=mine))
    assert found.verdict == "pass"
    assert found.found.endswith("'mine' is not registered, and so declares nothing there")
