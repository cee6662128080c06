"""Check the sampling law: the student has to write what its log-probabilities say.

`auditing` lists both checks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd import estimators
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.probe_gradients import flip_test, group_gradients, sample_score
from lit_opd.runs.verdicts import PASS, WARN, Finding, conclude, graded, worst

__all__ = ["sampler_gap", "sampling_law"]

_GAP, _WIDE_GAP = 0.02, 0.2
_SOME, _MANY = 0.01, 0.1  # shares of tokens at the border of a truncated law

_SAME_ARITHMETIC = "Let engine and trainer compute in one precision, or correct by importance weights."
_NO_BORDER = (
    "Sample from the whole distribution (rollout.temperature above 0, top_p=1, top_k=0, min_p=0), or let engine and "
    "trainer compute in float32: rounding decides what a truncated law still keeps."
)


def sampling_law(evidence: Evidence) -> Finding:
    """Check that E[grad log p] is zero over the student's rollouts, as every score function takes for granted."""
    rollout, estimator = evidence.rollout, evidence.distiller.estimator
    everything = replace(evidence, rollout=replace(rollout, mask_BT=rollout.real_BT))
    test = flip_test(group_gradients(everything.but(estimator=estimators.build(sample_score))))
    found = f"E[grad log p]: {test}"
    if rollout.law.is_student:
        fix = "The engine samples from another distribution than the student's: compare rollout.engine=local."
        return conclude(test.verdict, found, fix, **test._asdict())
    leans = [t.estimator.spec.name for t in estimator.terms if t.estimator.spec.on_policy]
    why = f"{leans[0]!r} takes the student's own law for granted" if leans else "the estimator does not mind"
    found = f"the law is not the student's own, by configuration, and {why}; {found}"
    fix = "Set rollout.temperature=1, top_p=1, top_k=0, min_p=0 and min_new_tokens=0."
    return conclude(WARN if leans else PASS, found, fix, **test._asdict())


def sampler_gap(evidence: Evidence) -> Finding:
    """Check that the engine's log-probabilities are those that the trainer finds under the same law."""
    readings, law = evidence.readings, evidence.rollout.law
    # What min_new_tokens forbids is known to the engine alone.
    here_N = readings.place_N >= law.min_new_tokens
    gap_N = (readings.sampler_logps_N - readings.law_logps_N)[here_N].double()
    if not len(gap_N):
        return conclude(PASS, "every token is one that rollout.min_new_tokens forbids to be the last")
    # One rounding decides what top-p, top-k and min-p still keep, and moves a log-probability there to -inf.
    excluded_N = readings.law_logps_N[here_N] == -torch.inf
    excluded, sizes_N = float(excluded_N.double().mean()), gap_N[~excluded_N].abs()
    size, largest = (float(sizes_N.mean()), float(sizes_N.max())) if len(sizes_N) else (0.0, 0.0)
    effective = _effective_share(-gap_N, readings.row_N[here_N], len(evidence.rollout))
    found = (f"sampler against trainer: {size:.1e} nats a token on average, {largest:.1e} at most; effective sample "
             f"size {effective:.0%}")  # fmt: skip
    if excluded:
        found += f"; {excluded:.2%} of the tokens are none that the trainer's law allows"
    verdicts = {_SAME_ARITHMETIC: graded(size, _GAP, _WIDE_GAP), _NO_BORDER: graded(excluded, _SOME, _MANY)}
    fix = " ".join(text for text, verdict in verdicts.items() if verdict != PASS)
    return conclude(
        worst(verdicts.values()), found, fix, mean_abs=size, max_abs=largest, excluded=excluded, ess=effective
    )


def _effective_share(log_weights_N: Tensor, row_N: Tensor, rows: int) -> float:
    """Compute the effective sample size of completions under importance weights, as a share of them."""
    sums_B = torch.zeros(rows, dtype=torch.float64).index_add(0, row_N, log_weights_N)
    if (sums_B == -torch.inf).all():
        return 0.0
    weights_B = (sums_B - sums_B.max()).exp()
    return float(weights_B.sum().square() / weights_B.square().sum()) / rows
