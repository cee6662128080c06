"""Check that the teacher is at home on what the student writes.

`auditing` lists it among its checks.
"""

from __future__ import annotations

from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.readings import Readings
from lit_opd.runs.verdicts import PASS, WARN, Finding, conclude

__all__ = ["student_prefixes"]

# Nats by which the teacher's entropy may be higher on the student's prefixes, and how many times as high.
_MORE, _TIMES = 0.5, 2.0


def student_prefixes(evidence: Evidence) -> Finding:
    """Check that the teacher is not much less sure on the student's prefixes than on its own.

    A teacher that does not know what comes next has little to teach there, and what it says of single tokens is noise.
    """
    theirs, own = _summary(evidence.readings), _summary(evidence.shown_readings)
    found = "; ".join(
        f"on {whose} prefixes entropy {s['entropy']:.2f}, NLL {s['nll']:.2f}, mass on first choices {s['top_mass']:.2f}"
        for whose, s in (("the student's", theirs), ("its own", own))
    )
    lost = theirs["entropy"] > max(own["entropy"] + _MORE, _TIMES * own["entropy"])
    fix = ("The student's prefixes are out of the teacher's range: train the student on the teacher's completions "
           "first, set rollout.student_share below 1, or shorten rollout.max_new_tokens.")  # fmt: skip
    numbers = {f"{whose}_{k}": v for whose, s in (("student", theirs), ("own", own)) for k, v in s.items()}
    return conclude(WARN if lost else PASS, found, fix, **numbers)


def _summary(readings: Readings) -> dict[str, float]:
    values = {"entropy": readings.entropy_N, "nll": -readings.teacher_logps_N, "top_mass": readings.top_logps_N.exp()}
    return {name: float(values_N.double().mean()) for name, values_N in values.items()}
