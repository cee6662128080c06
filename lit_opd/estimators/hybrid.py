"""Estimators between or made of the others."""

from __future__ import annotations

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sequence import check_gamma, discounted_reverse_kl
from lit_opd.types import Estimate, TokenBatch

__all__ = ["hybrid_reverse_kl"]


@register_estimator(
    "hybrid",
    family="hybrid",
    target="sequence_reverse_kl",
    unbiased=False,
    needs="token",
    source="arXiv:2603.25562, discounted return",
    check=check_gamma,
    variants=(
        Variant({"gamma": 1.0}, "undiscounted, it is the sequence estimator", unbiased=True),
        Variant({"gamma": 0.0}, "it is the token estimator", target="reverse_kl", unbiased=True),
    ),
)
def hybrid_reverse_kl(tokens: TokenBatch, *, gamma: float = 0.5) -> Estimate:
    """Discounted reverse KL, between `token` (gamma 0) and `sequence` (gamma 1): bias falls, variance rises with gamma.

    Formula, with d_i detached: loss_t = (sum over i >= t of gamma^(i - t) d_i) log p(y_t). Bias against the sequence
    reverse KL shrinks as gamma grows, variance grows.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.
        gamma: discount, 0 to 1.

    Returns:
        Surrogate loss and log-ratio, [B, T].
    """
    return discounted_reverse_kl(tokens, gamma)
