"""The null test: a student that is its own teacher has nothing to learn."""

from __future__ import annotations

import copy

from lit_opd import estimators
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.findings import FAIL, PASS, WARN, Finding, graded
from lit_opd.lab.audit.gradients import flip_test, gradient, group_gradients, norm
from lit_opd.lab.audit.score import sample_score
from lit_opd.models import LanguageModel

__all__ = ["null_test"]

# Beside a gradient of one nat a token: rounding of bf16 stays below the first, another distribution exceeds the second.
_ROUNDING, _BIAS = 1e-2, 1e-1
_UNLIKELY, _IMPOSSIBLE = 1e-2, 1e-3


def null_test(evidence: Evidence) -> Finding:
    """Whether the estimator's gradient is zero, as its contract says, where the teacher is the student itself.

    What is left is the floor of the arithmetic: a gradient that small in training is rounding.
    """
    equal = evidence.taught_by(_twin(evidence.student))
    unit = norm(gradient(equal.with_estimator(estimators.build(sample_score))))
    floor = norm(gradient(equal)) / max(unit, 1e-30)
    numbers = {"floor": floor}
    found = f"with the student as its own teacher the gradient is {floor:.1e} times that of one nat a token"
    promise = _promise(evidence)
    if promise == "sample":
        verdict = graded(floor, _ROUNDING, _BIAS)
        fix = (
            ""
            if verdict == PASS
            else "Compute in more precision (trainer.precision=32-true), or correct the estimator."
        )
        return Finding("null test", verdict, found, fix, numbers)
    if promise == "expectation":
        return _in_expectation(equal, found, numbers)
    says = "promises nothing" if promise == "never" else "is not registered, and so declares nothing"
    return Finding("null test", PASS, f"{found}; {evidence.estimator.spec.name!r} {says} there", numbers=numbers)


def _in_expectation(equal: Evidence, found: str, numbers: dict[str, float]) -> Finding:
    test = flip_test(group_gradients(equal))
    numbers |= {"noise_ratio": test.ratio, "p_value": test.p_value}
    found += f"; its mean is {test.ratio:.2f} times as long as noise (p = {test.p_value:.2g}), zero in expectation only"
    if test.p_value >= _UNLIKELY:
        return Finding("null test", PASS, found, numbers=numbers)
    verdict = WARN if test.p_value >= _IMPOSSIBLE else FAIL
    return Finding("null test", verdict, found, "Check it: python -m lit_opd check NAME.", numbers)


def _promise(evidence: Evidence) -> str | None:
    spec = evidence.estimator.spec
    return evidence.estimator.contract.at_equal if spec.name in estimators.names() else None


def _twin(student: LanguageModel) -> LanguageModel:
    """The student as a teacher, in the same arithmetic; its head is detached wherever it teaches."""
    twin = copy.copy(student)
    twin.key = "teacher"
    return twin
