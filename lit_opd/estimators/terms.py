"""Estimators made of others: weighted sums, and weights for every token of another estimator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lit_opd.estimators.contract import BoundEstimator, EstimatorFn, Term, any_clipped
from lit_opd.estimators.registry import build, get, register_estimator
from lit_opd.types import Estimate, TokenBatch

__all__ = ["register_mixture", "register_weighting"]

Mixture = Callable[..., Mapping[str, Any]]
Weighting = Callable[..., Tensor]

_TOKENS = inspect.Parameter("tokens", inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BASE = inspect.Parameter("base", inspect.Parameter.KEYWORD_ONLY, default="token")


def register_mixture(name: str, **contract: Any) -> Callable[[Mixture], Mixture]:
    """Register a weighted sum of estimators under a name.

    The decorated function takes keywords only and returns `{name: weight}` or `{name: {weight: w, keyword: value}}`. In
    training every term is computed where it is cheapest: those that see positions inside the head's chunks, the others
    on whole sequences.

    Args:
        name: how a configuration selects it.
        **contract: as of `register_estimator`.
    """

    def register(parts: Mixture) -> Mixture:
        def split(**keywords: Any) -> tuple[Term, ...]:
            return tuple(term for part in parts(**keywords).items() for term in _read_part(part))

        def estimator(tokens: TokenBatch, **keywords: Any) -> Estimate:
            return _sum(split(**keywords), tokens)

        _dress(estimator, parts, [_TOKENS, *inspect.signature(parts).parameters.values()])
        register_estimator(name, family="hybrid", split=split, **{"needs": "terms", **contract})(estimator)
        return parts

    return register


def register_weighting(name: str, *, needs: str = "token", **contract: Any) -> Callable[[Weighting], Weighting]:
    """Register weights for the tokens of another estimator, its keyword `base`; by default the sampled reverse KL.

    The decorated function maps a whole [B, T] batch to detached weights [B, T]. `base` is a registered name, or a
    mapping with the key `name` and keywords.

    Args:
        name: how a configuration selects it.
        needs: what the weights are made from: `token`, with extras as in `register_estimator`.
        **contract: as of `register_estimator`, with the default base.
    """

    def register(weights: Weighting) -> Weighting:
        def split(*, base: str | Mapping[str, Any], **keywords: Any) -> tuple[Term, ...]:
            weighting, wanted = functools.partial(weights, **keywords), get(name).needs
            return tuple(Term(t.weight, t.estimator, weighting, wanted) for t in _build_base(base).terms)

        def estimator(tokens: TokenBatch, *, base: str | Mapping[str, Any] = "token", **keywords: Any) -> Estimate:
            return _sum(split(base=base, **keywords), tokens)

        own = list(inspect.signature(weights).parameters.values())
        _dress(estimator, weights, [*own, _BASE])
        register_estimator(name, family="hybrid", needs=needs, split=split, **contract)(estimator)
        return weights

    return register


def _dress(estimator: EstimatorFn, source: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    functools.update_wrapper(estimator, source)
    estimator.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


def _sum(terms: tuple[Term, ...], tokens: TokenBatch) -> Estimate:
    estimates = [(term.weight, term(tokens)) for term in terms]
    share = sum(weight for weight, _ in estimates)
    loss = sum(weight * estimate.loss_BT for weight, estimate in estimates)
    kl = sum(weight * estimate.kl_BT for weight, estimate in estimates)
    clipped = any_clipped(estimate.clipped_BT for _, estimate in estimates)
    return Estimate(loss_BT=loss, kl_BT=kl / share, clipped_BT=clipped)  # type: ignore[arg-type]


def _build_base(base: str | Mapping[str, Any]) -> BoundEstimator:
    keywords = dict(base) if isinstance(base, Mapping) else {"name": base}
    if "name" not in keywords:
        raise ValueError(f"base must be a name, or a mapping with the key name, found {base!r}")
    estimator = build(keywords.pop("name"), **keywords)
    if any(term.weighting is not None for term in estimator.terms):
        raise ValueError(f"base must not be weighted itself, found {base!r}")
    return estimator


def _read_part(part: tuple[str, Any]) -> tuple[Term, ...]:
    """The terms of `name: weight` or `name: {weight: w, keyword: value}`."""
    name, value = part
    keywords = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = keywords.pop("weight", None)
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise ValueError(f"term {name!r} needs a number as its weight, found {weight!r}")
    if not get(name).needs:
        raise ValueError(f"a mix cannot hold a mix, found {name!r}: list the terms side by side")
    return tuple(term._replace(weight=weight * term.weight) for term in build(name, **keywords).terms)
