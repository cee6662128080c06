"""Importance ratios of student over sampler, and ways to bound them.

None of these stops the gradient: detach the ratio where it is a weight, leave it where it is the surrogate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast

__all__ = ["banded_ratio", "importance_ratio", "one_sided_ratio", "truncated_ratio"]

# exp(20) is 5e8: far beyond any ratio that carries information, and still squarable in fp32.
_MAX_LOG_RATIO = 20.0


def importance_ratio(student_logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """Student over sampler probability of the taken tokens, exp(log p - log mu).

    Args:
        student_logps: any shape, log-probabilities p of the taken tokens.
        sampler_logps: the same shape, log-probabilities mu under the law that sampled them.

    Returns:
        The same shape, without unit, in fp32 (float64 stays). The log-ratio is clamped to [-20, 20], beyond which the
        ratio has no gradient.
    """
    log_ratio = upcast(student_logps) - upcast(sampler_logps)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def truncated_ratio(ratio: Tensor, cap: float) -> Tensor:
    """min(ratio, cap): truncated importance sampling, biased for bounded variance.

    Args:
        ratio: any shape, importance ratios.
        cap: the largest ratio let through, above 0.

    Returns:
        The same shape.

    Raises:
        ValueError: `cap` is not positive.
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive, found {cap}")
    return ratio.clamp(max=cap)


def banded_ratio(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where low <= ratio <= high, else 0: tokens outside the band are dropped, not clipped.

    Source: IcePop; MOPD, arXiv:2601.02780.

    Args:
        ratio: any shape, importance ratios.
        low: lower end of the band, at least 0.
        high: upper end of the band, at least `low`.

    Returns:
        The same shape.

    Raises:
        ValueError: the ends are no band.
    """
    if not 0 <= low <= high:
        raise ValueError(f"low and high must satisfy 0 <= low <= high, found {low} and {high}")
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def one_sided_ratio(student_logps: Tensor, sampler_logps: Tensor, max_drop: float = 0.2) -> Tensor:
    """The ratio, but 0 where the token has become less probable by more than `max_drop`.

    Dropped where mu - p > max_drop, a difference of probabilities: rare tokens are kept whatever their ratio, and so is
    every token that has become more probable. Source: the token mask of prime-rl.

    Args:
        student_logps: any shape, log-probabilities p of the taken tokens.
        sampler_logps: the same shape, log-probabilities mu under the law that sampled them.
        max_drop: largest drop in probability let through, 0 to 1.

    Returns:
        The same shape, fp32 (float64 stays); see `importance_ratio`.

    Raises:
        ValueError: `max_drop` outside [0, 1].
    """
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop must lie in [0, 1], found {max_drop}")
    kept = upcast(sampler_logps).exp() - upcast(student_logps).exp() <= max_drop
    return torch.where(kept, importance_ratio(student_logps, sampler_logps), 0.0)
