"""The registry: what an estimator declares, how it is found by name or path, and how its keywords are bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from lit_opd.errors import UserError, choose, suggest
from lit_opd.plugins import import_function
from lit_opd.types import Estimate, TokenBatch

__all__ = ["BoundEstimator", "EstimatorSpec", "build", "get", "names", "register_estimator"]

EstimatorFn = Callable[..., Estimate]
F = TypeVar("F", bound=EstimatorFn)

FAMILIES = ("token", "sequence", "hybrid")
NEEDS = ("token", "support", "full")
EXTRAS = ("kl", "rewards")


@dataclass(frozen=True)
class EstimatorSpec:
    """An estimator and the contract it declares.

    Attributes:
        name: the registered name, or the path it was loaded from.
        fn: the pure function.
        family: `token` (each position for itself), `sequence` (credit flows to earlier positions) or `hybrid`.
        target: whose gradient it aims at, or None where it changes the optimum on purpose or declares nothing.
        unbiased: is its expected gradient exactly the target's, on-policy?
        needs: `token`, `support` or `full`; `+kl` where it wants the exact per-position KL as a baseline, `+rewards`
            where it wants outcome rewards.
        source: where the formula comes from.
        check: raises ValueError for keywords that cannot work, before any model is loaded.
    """

    name: str
    fn: EstimatorFn
    family: str = "token"
    target: str | None = None
    unbiased: bool = False
    needs: str = "token"
    source: str = ""
    check: Callable[..., None] | None = field(default=None, repr=False)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.fn) or "").split("\n")[0]


@dataclass(frozen=True)
class BoundEstimator:
    """An estimator with its keywords; calling it maps a `TokenBatch` to an `Estimate`."""

    spec: EstimatorSpec
    kwargs: Mapping[str, Any]

    def __call__(self, tokens: TokenBatch) -> Estimate:
        """Apply the estimator."""
        return self.spec.fn(tokens, **self.kwargs)

    @cached_property
    def terms(self) -> tuple[tuple[float, BoundEstimator], ...]:
        """The weighted estimators a mix is made of; every other estimator is its own only term."""
        if self.spec.name != "mix":
            return ((1.0, self),)
        parts = self.kwargs["terms"].items()
        return tuple((weight, build(name, **kwargs)) for name, (weight, kwargs) in map(read_term, parts))

    @property
    def support_size(self) -> int:
        """K, for an estimator that needs a support: by convention its keyword `k`."""
        return int(_bound_arguments(self.spec.fn, self.kwargs)["k"])


def register_estimator(
    name: str,
    *,
    family: str = "token",
    target: str | None = None,
    unbiased: bool = False,
    needs: str = "token",
    source: str = "",
    check: Callable[..., None] | None = None,
) -> Callable[[F], F]:
    """Register a pure function `(tokens: TokenBatch, *, ...) -> Estimate` under a name, with its contract.

    Args:
        name: how a configuration selects it.
        family: `token`, `sequence` or `hybrid`.
        target: whose gradient it aims at, e.g. `reverse_kl`, `sequence_reverse_kl`; None claims nothing.
        unbiased: whether its expected gradient is exactly the target's, on-policy.
        needs: `token`, `support` or `full`, optionally with `+kl` and `+rewards`.
        source: citation.
        check: called with the keywords; raises ValueError where they cannot work.

    Raises:
        UserError: an unknown family or need, a name already taken by another function, or a `support` or `full`
            estimator outside the `token` family: those are called on slices of positions.
    """
    choose(f"register_estimator({name!r}).family", family, FAMILIES)
    base, *extras = needs.split("+")
    choose(f"register_estimator({name!r}).needs", base, NEEDS)
    for extra in extras:
        choose(f"register_estimator({name!r}).needs", extra, EXTRAS)
    if family != "token" and base != "token":
        expected = "family 'token' where needs is 'support' or 'full': those see slices of positions"
        raise UserError(f"register_estimator({name!r})", expected, f"family {family!r}", "Combine them with `mix`.")

    def register(fn: F) -> F:
        taken = _REGISTRY.get(name)
        if taken is not None and inspect.getsourcefile(taken.fn) != inspect.getsourcefile(fn):
            raise UserError(f"register_estimator({name!r})", "a new name", "a registered one", "Choose another name.")
        _REGISTRY[name] = EstimatorSpec(name, fn, family, target, unbiased, needs, source, check)
        return fn

    return register


_REGISTRY: dict[str, EstimatorSpec] = {}


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_REGISTRY)


def get(name: str | EstimatorFn) -> EstimatorSpec:
    """The specification of an estimator.

    Args:
        name: a registered name, `package.module:function`, `path/to/file.py:function`, or the function itself. A
            function that was not registered is taken as a `token` estimator that needs sampled tokens.

    Raises:
        UserError: no such name, module, file or function.
    """
    if not isinstance(name, str):
        return _spec_of(name, getattr(name, "__name__", "estimator"))
    if name in _REGISTRY:
        return _REGISTRY[name]
    if ":" in name:
        return _spec_of(import_function("estimator.name", name), name)
    raise UserError("estimator.name", "a registered estimator or file.py:function", repr(name), suggest(name, names()))


def build(name: str | EstimatorFn, **kwargs: Any) -> BoundEstimator:
    """An estimator with its keywords bound and checked; no weights are needed.

    Args:
        name: as in `get`.
        **kwargs: the estimator's keyword-only hyper-parameters.

    Raises:
        UserError: an unknown or missing keyword, or a value that cannot work.
    """
    spec = get(name)
    known = _keywords(spec.fn)
    for key in kwargs:
        if key not in known:
            remedy = suggest(key, known) if known else f"{spec.name} takes none."
            raise UserError(f"estimator.kwargs.{key}", f"a keyword of {spec.name}", "an unknown one", remedy)
    try:
        bound = _bound_arguments(spec.fn, kwargs)
        if spec.check is not None:
            spec.check(**bound)
    except (TypeError, ValueError) as error:
        raise UserError("estimator.kwargs", f"valid keywords for {spec.name}", str(error), "Correct them.") from error
    if spec.needs.startswith("support") and "k" not in bound:
        raise UserError("estimator.name", "a keyword `k`, the support size", f"none in {spec.name}", "Add `k: int`.")
    estimator = BoundEstimator(spec, kwargs)
    _ = estimator.terms  # builds, and so checks, what a mix is made of
    return estimator


def read_term(term: tuple[str, Any]) -> tuple[str, tuple[float, dict[str, Any]]]:
    """A term of a mix, `name: weight` or `name: {weight: w, ...keywords}`, as (name, (weight, keywords)).

    Raises:
        ValueError: the weight is missing or not a number.
    """
    name, value = term
    kwargs = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = kwargs.pop("weight", None)
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise ValueError(f"term {name!r} needs a number as its weight, found {weight!r}")
    return name, (float(weight), kwargs)


def _spec_of(fn: EstimatorFn, name: str) -> EstimatorSpec:
    registered = next((spec for spec in _REGISTRY.values() if spec.fn is fn), None)
    return registered or EstimatorSpec(name, fn)


def _keywords(fn: EstimatorFn) -> list[str]:
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _bound_arguments(fn: EstimatorFn, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(fn).bind(None, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments.pop(next(iter(arguments)))
    return arguments
