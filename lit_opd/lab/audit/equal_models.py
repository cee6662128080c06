"""Run the null test: a student that is its own teacher has nothing to learn.

`auditing` lists it among its checks.
"""

from __future__ import annotations

import copy

from lit_opd import estimators
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.probe_gradients import flip_test, gradient, group_gradients, norm, sample_score
from lit_opd.runs.verdicts import PASS, Finding, conclude, graded

__all__ = ["null_test"]

# Beside a gradient of one nat a token: rounding of bf16 stays below the first, another distribution exceeds the second.
_ROUNDING, _BIAS = 1e-2, 1e-1


def null_test(evidence: Evidence) -> Finding:
    """Check that the gradient is zero, as the estimator's contract says, where the teacher is the student itself.

    What is left is the floor of the arithmetic: a gradient that small in training is rounding.
    """
    # The student in the same arithmetic; its head is detached wherever it teaches.
    twin = copy.copy(evidence.student)
    twin.key = "teacher"
    equal, spec = evidence.taught_by(twin), evidence.distiller.estimator.spec
    unit = norm(gradient(equal.but(estimator=estimators.build(sample_score))))
    floor = norm(gradient(equal)) / max(unit, 1e-30)
    found = f"with the student as its own teacher the gradient is {floor:.1e} times that of one nat a token"
    if spec.name not in estimators.names():
        return conclude(PASS, f"{found}; {spec.name!r} is not registered, and so declares nothing there", floor=floor)
    promise = evidence.distiller.estimator.contract.at_equal
    if promise == "sample":
        fix = "Compute in more precision (trainer.precision=32-true), or correct the estimator."
        return conclude(graded(floor, _ROUNDING, _BIAS), found, fix, floor=floor)
    if promise == "never":
        return conclude(PASS, f"{found}; {spec.name!r} promises nothing there", floor=floor)
    test = flip_test(group_gradients(equal))
    found += f"; its mean is {test}, zero in expectation only"
    return conclude(test.verdict, found, "Check it: python -m lit_opd check NAME.", floor=floor, **test._asdict())
