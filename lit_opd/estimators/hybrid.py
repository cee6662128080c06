"""Estimators between or made of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_opd.estimators.registry import build, read_term, register_estimator
from lit_opd.estimators.sequence import discounted_reverse_kl
from lit_opd.types import Estimate, TokenBatch


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], found {gamma}")


@register_estimator(
    "hybrid",
    family="hybrid",
    target="sequence_reverse_kl",
    unbiased=False,
    needs="token",
    source="arXiv:2603.25562, discounted return",
    check=_check_gamma,
)
def hybrid_reverse_kl(tokens: TokenBatch, *, gamma: float = 0.5) -> Estimate:
    """Discounted reverse KL: between the token estimator (gamma 0) and the sequence one (gamma 1).

    Formula, with d_i detached: loss_t = (sum over i >= t of gamma^(i - t) d_i) log p(y_t). Bias against the sequence
    reverse KL shrinks as gamma grows, variance grows.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.
        gamma: discount, 0 to 1.

    Returns:
        Surrogate loss and log-ratio, [B, T].
    """
    return discounted_reverse_kl(tokens, gamma)


def _check_terms(terms: Mapping[str, Any]) -> None:
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"terms must map estimator names to weights, found {terms!r}")
    for name, _ in map(read_term, terms.items()):
        if name == "mix":
            raise ValueError("a mix cannot hold a mix: list the terms side by side")
    if sum(weight for _, (weight, _) in map(read_term, terms.items())) <= 0:
        raise ValueError("the weights of a mix must have a positive sum")


@register_estimator(
    "mix",
    family="hybrid",
    target=None,
    unbiased=False,
    needs="token",
    source="weighted sums as in arXiv:2306.08543 (sequence + single-step), arXiv:2605.16826 (forward + reverse)",
    check=_check_terms,
)
def mix(tokens: TokenBatch, *, terms: Mapping[str, Any]) -> Estimate:
    """Weighted sum of registered estimators.

    Formula: loss_t = sum over terms of weight x loss_t of the term; the logged KL is their weighted mean.

    Args:
        tokens: whatever the terms need. In training every term is computed where it is cheapest: per-position terms
            inside the head's chunks, the others on [B, T].
        terms: `{name: weight}` or `{name: {weight: w, keyword: value, ...}}`.

    Returns:
        Surrogate loss and KL estimate, the leading shape of the tokens.
    """
    parts = [(weight, build(name, **kwargs)(tokens)) for name, (weight, kwargs) in map(read_term, terms.items())]
    total = sum(weight for weight, _ in parts)
    loss = sum(weight * part.loss_BT for weight, part in parts)
    kl = sum(weight * part.kl_BT for weight, part in parts)
    return Estimate(loss_BT=loss, kl_BT=kl / total)  # type: ignore[arg-type]
