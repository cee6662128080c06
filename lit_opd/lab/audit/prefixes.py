"""Is the teacher at home on what the student writes?"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.findings import PASS, WARN, Finding
from lit_opd.lab.audit.positions import Positions

__all__ = ["student_prefixes"]

# Nats by which the teacher's entropy may be higher on the student's prefixes, and how many times as high.
_MORE, _TIMES = 0.5, 2.0


def student_prefixes(evidence: Evidence) -> Finding:
    """Whether the teacher is much less sure on the student's prefixes than on its own.

    A teacher that does not know what comes next has little to teach there, and what it says of single tokens is noise.
    """
    theirs, own = _summary(evidence.positions), _summary(evidence.shown_positions)
    numbers = {f"student_{k}": v for k, v in theirs.items()} | {f"own_{k}": v for k, v in own.items()}
    found = "; ".join(
        f"on {whose} prefixes entropy {s['entropy']:.2f}, NLL {s['nll']:.2f}, mass on first choices {s['top_mass']:.2f}"
        for whose, s in (("the student's", theirs), ("its own", own))
    )
    lost = theirs["entropy"] - own["entropy"]
    if lost > _MORE and theirs["entropy"] > _TIMES * own["entropy"]:
        fix = ("The student's prefixes are out of the teacher's range: train the student on the teacher's completions "
               "first, set rollout.student_share below 1, or shorten rollout.max_new_tokens.")  # fmt: skip
        return Finding("student prefixes", WARN, found, fix, numbers)
    return Finding("student prefixes", PASS, found, numbers=numbers)


def _summary(positions: Positions) -> dict[str, float]:
    values: dict[str, Tensor] = {
        "entropy": positions.entropy_N, "nll": -positions.teacher_logps_N, "top_mass": positions.top_logps_N.exp(),
    }  # fmt: skip
    return {name: float(values_N.to(torch.float64).mean()) for name, values_N in values.items()}
