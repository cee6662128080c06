"""The sampling law: does the student write what its log-probabilities say?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd import estimators
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.findings import FAIL, PASS, VERDICTS, WARN, Finding, graded
from lit_opd.lab.audit.gradients import flip_test, group_gradients
from lit_opd.types import Estimate, TokenBatch

__all__ = ["sample_score", "sampler_gap", "sampling_law"]

_UNLIKELY, _IMPOSSIBLE = 1e-2, 1e-3
_GAP, _WIDE_GAP = 0.02, 0.2
_SOME, _MANY = 0.01, 0.1  # shares of tokens at the border of a truncated law

_SAME_ARITHMETIC = "Let engine and trainer compute in one precision, or correct by importance weights."
_NO_BORDER = (
    "Sample from the whole distribution (rollout.temperature above 0, top_p=1, top_k=0, min_p=0), or let engine and "
    "trainer compute in float32: rounding decides what a truncated law still keeps."
)


def sample_score(tokens: TokenBatch) -> Estimate:
    """The log-probability of what was sampled: its gradient is the score, whose mean over the student's law is zero."""
    return Estimate(tokens.student_logps_BT, torch.zeros_like(tokens.teacher_logps_BT))


def sampling_law(evidence: Evidence) -> Finding:
    """Whether E[grad log p] is zero over the student's rollouts, as every score function takes for granted."""
    rollout = evidence.rollout
    everything = replace(evidence, rollout=replace(rollout, mask_BT=rollout.real_BT))
    scores = everything.with_estimator(estimators.build(sample_score))
    test = flip_test(group_gradients(scores))
    found = f"E[grad log p]: {test.ratio:.2f} times as long as noise (p = {test.p_value:.2g})"
    numbers = {"noise_ratio": test.ratio, "p_value": test.p_value}
    if not rollout.law.is_student:
        leans = [t.estimator.spec.name for t in evidence.estimator.terms if t.estimator.spec.on_policy]
        why = f"{leans[0]!r} takes the student's own law for granted" if leans else "the estimator does not mind"
        found = f"the law is not the student's own, by configuration, and {why}; {found}"
        fix = "Set rollout.temperature=1, top_p=1, top_k=0, min_p=0 and min_new_tokens=0." if leans else ""
        return Finding("sampling law", WARN if leans else PASS, found, fix, numbers)
    if test.p_value >= _UNLIKELY:
        return Finding("sampling law", PASS, found, numbers=numbers)
    fix = "The engine samples from another distribution than the student's: compare rollout.engine=local."
    return Finding("sampling law", WARN if test.p_value >= _IMPOSSIBLE else FAIL, found, fix, numbers)


def sampler_gap(evidence: Evidence) -> Finding:
    """Whether the engine's log-probabilities are those that the trainer finds under the same law."""
    positions, law = evidence.positions, evidence.rollout.law
    # What min_new_tokens forbids is known to the engine alone.
    here_N = positions.place_N >= law.min_new_tokens
    gap_N = (positions.sampler_logps_N - positions.law_logps_N)[here_N].double()
    if not len(gap_N):
        return Finding("sampler gap", PASS, "every token is one that rollout.min_new_tokens forbids to be the last")
    # One rounding decides what top-p, top-k and min-p still keep, and moves a log-probability there to -inf.
    excluded_N = positions.law_logps_N[here_N] == -torch.inf
    excluded, sizes_N = float(excluded_N.double().mean()), gap_N[~excluded_N].abs()
    size, largest = (float(sizes_N.mean()), float(sizes_N.max())) if len(sizes_N) else (0.0, 0.0)
    effective = _effective_share(-gap_N, positions.row_N[here_N], len(evidence.rollout))
    found = (f"sampler against trainer: {size:.1e} nats a token on average, {largest:.1e} at most; effective sample "
             f"size {effective:.0%}")  # fmt: skip
    verdicts = graded(size, _GAP, _WIDE_GAP), graded(excluded, _SOME, _MANY)
    fixes = [_SAME_ARITHMETIC, _NO_BORDER]
    if excluded:
        found += f"; {excluded:.2%} of the tokens are none that the trainer's law allows"
    fix = " ".join(text for text, verdict in zip(fixes, verdicts, strict=True) if verdict != PASS)
    numbers = {"mean_abs": size, "max_abs": largest, "excluded": excluded, "ess": effective}
    return Finding("sampler gap", max(verdicts, key=VERDICTS.index), found, fix, numbers)


def _effective_share(log_weights_N: Tensor, row_N: Tensor, rows: int) -> float:
    """The effective sample size of completions under importance weights, as a share of them."""
    sums_B = torch.zeros(rows, dtype=torch.float64).index_add(0, row_N, log_weights_N)
    if (sums_B == -torch.inf).all():
        return 0.0
    weights_B = (sums_B - sums_B.max()).exp()
    return float(weights_B.sum().square() / weights_B.square().sum()) / rows
