"""Weigh stale samples by student over sampler, and bound these weights.

Arguments are log-probabilities of the taken tokens, in any shape, p of the student and mu of the law that sampled them.
None of these stops the gradient: detach the ratio where it is a weight, leave it where it is the surrogate. A bound
that is none raises a ValueError. The estimators of `estimators.corrected`, `reference` and `outcomes` call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import POSITIVE, SHARE

__all__ = ["banded_ratio", "importance_ratio", "one_sided_ratio", "truncated_ratio"]

# exp(20) is 5e8: far beyond any ratio that carries information, and still squarable in fp32.
_MAX_LOG_RATIO = 20.0


def importance_ratio(student_logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """Divide student by sampler probability of the taken tokens, exp(log p - log mu).

    The log-ratio is clamped to [-20, 20], beyond which the ratio has no gradient.

    >>> importance_ratio(torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.4]).log())
    tensor([2.0000, 0.5000])
    """
    log_ratio = upcast(student_logps) - upcast(sampler_logps)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def truncated_ratio(ratio: Tensor, cap: float) -> Tensor:
    """Cap importance ratios at a positive `cap`, which biases for bounded variance.

    >>> truncated_ratio(torch.tensor([0.5, 8.0]), cap=5.0)
    tensor([0.5000, 5.0000])
    """
    POSITIVE.check("cap", cap)
    return ratio.clamp(max=cap)


def banded_ratio(ratio: Tensor, low: float, high: float) -> Tensor:
    """Keep importance ratios between `low` and `high`, and drop tokens outside the band by a ratio of 0.

    Source: IcePop; MOPD, arXiv:2601.02780.

    >>> banded_ratio(torch.tensor([0.1, 1.5, 8.0]), low=0.5, high=2.0)
    tensor([0.0000, 1.5000, 0.0000])
    """
    if not 0 <= low <= high:
        raise ValueError(f"low and high must satisfy 0 <= low <= high, found {low} and {high}")
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def one_sided_ratio(student_logps: Tensor, sampler_logps: Tensor, max_drop: float = 0.2) -> Tensor:
    """Divide student by sampler probability, with 0 for tokens that became less probable by more than `max_drop`.

    Dropped where mu - p > max_drop, a difference of probabilities: rare tokens are kept whatever their ratio, and so is
    every token that has become more probable. Source: the token mask of prime-rl.

    >>> student, sampler = torch.tensor([0.1, 0.8, 0.01]).log(), torch.tensor([0.5, 0.4, 0.1]).log()
    >>> one_sided_ratio(student, sampler, max_drop=0.2)
    tensor([0.0000, 2.0000, 0.1000])
    """
    SHARE.check("max_drop", max_drop)
    kept = upcast(sampler_logps).exp() - upcast(student_logps).exp() <= max_drop
    return torch.where(kept, importance_ratio(student_logps, sampler_logps), 0.0)
