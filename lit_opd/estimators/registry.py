"""Register estimators with their contracts, and find them by name or path.

Three kinds of functions are registered: estimators, sums of them, and weights for the tokens of one. The families in
this room and users' files register, `terms.build` looks up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from lit_opd.errors import UserError, choose, suggest
from lit_opd.estimators.contract import EstimatorFn, EstimatorSpec, Mixture, Variant, Weighting
from lit_opd.estimators.needs import needs_of, read_needs
from lit_opd.plugins import calling, import_object
from lit_opd.types import Need

__all__ = ["get", "names", "register_estimator", "register_mixture", "register_weighting"]

F = TypeVar("F", bound=Callable[..., Any])

FAMILIES = ("token", "sequence", "hybrid")
AT_EQUAL = ("sample", "expectation", "never")


def register_estimator(
    name: str,
    *,
    family: str = "token",
    target: str | None = None,
    unbiased: bool = False,
    needs: str | Iterable[Need] = "token",
    source: str = "",
    check: Callable[..., None] | None = None,
    at_equal: str = "sample",
    on_policy: bool | None = None,
    corrects: bool = False,
    variants: tuple[Variant, ...] = (),
    small: Mapping[str, Any] | None = None,
    kind: Literal["estimator", "mixture", "weighting"] = "estimator",
) -> Callable[[F], F]:
    """Register a pure function `(tokens: TokenBatch, *, ...) -> Estimate` under a name, with its contract.

    Args:
        name: how a configuration selects it.
        family: `token` (each position for itself), `sequence` (a token also pays for those after it) or `hybrid`.
        target: whose gradient it aims at, e.g. `reverse_kl`; None where it changes the optimum or claims nothing.
        unbiased: whether its expected gradient is exactly the target's, on-policy.
        needs: `token`, `support` or `full`, with any of `+kl`, `+entropy`, `+rewards`, `+groups`, `+reference`.
        source: citation.
        check: called with the keywords; raises ValueError where they cannot work.
        at_equal: where student == teacher, the gradient is zero for every `sample`, in `expectation`, or `never`.
        on_policy: whether it is right only where the student itself wrote the tokens; by default where it needs no more
            than these.
        corrects: whether it weighs tokens by student over sampler, so that stale or tempered samples do.
        variants: keywords with which the contract is another, or which deserve a test of their own.
        small: keywords that tests and `check` take for the defaults, where those set a limit that models of a few
            tokens and positions never meet.
        kind: set by `register_mixture`, whose functions return terms, and `register_weighting`, whose return weights.

    Raises:
        UserError: an unknown family or need, a name already taken by another function, or a `token` estimator that
            asks for what belongs to rows, or another that asks for more than tokens: what is called on slices of
            positions sees no rows, and only that may see a support or the vocabulary.
    """
    where = f"register_estimator({name!r})"
    choose(f"{where}.at_equal", at_equal, AT_EQUAL)
    choose(f"{where}.family", family, FAMILIES)
    wanted = frozenset[Need]() if kind == "mixture" else read_needs(f"{where}.needs", needs)
    _check_needs(where, family, wanted)

    def register(fn: F) -> F:
        taken = _REGISTRY.get(name)
        if taken is not None and inspect.getsourcefile(taken.fn) != inspect.getsourcefile(fn):
            raise UserError(where, "a new name", "a registered one", "Choose another name.")
        sampled = Need.TOKEN in wanted if on_policy is None else on_policy
        _REGISTRY[name] = EstimatorSpec(
            name,
            fn,
            family,
            target,
            unbiased,
            wanted,
            source,
            check,
            at_equal,
            sampled,
            corrects,
            variants,
            dict(small or {}),
            kind,
        )
        return fn

    return register


def register_mixture(name: str, **contract: Any) -> Callable[[Mixture], Mixture]:
    """Register a weighted sum of estimators under a name.

    The decorated function takes keywords only and returns `{name: weight}` or `{name: {weight: w, keyword: value}}`, or
    a list of terms as of the key `estimator.terms`. In training every term is computed where it is cheapest: those that
    see positions inside the head's chunks, the others on whole sequences.

    Args:
        name: how a configuration selects it.
        **contract: as of `register_estimator`.
    """
    return register_estimator(name, family="hybrid", kind="mixture", **contract)


def register_weighting(name: str, *, needs: str = "token", **contract: Any) -> Callable[[Weighting], Weighting]:
    """Register weights for the tokens of another estimator, which its keyword `base` names.

    The decorated function maps a whole [B, T] batch to detached weights [B, T]. `base` is a registered name, or a
    mapping with the key `name` and keywords.

    Args:
        name: how a configuration selects it.
        needs: what the weights are made from: `token`, with extras as in `register_estimator`.
        **contract: as of `register_estimator`, with the default base.
    """
    return register_estimator(name, family="hybrid", kind="weighting", needs=needs, **contract)


def _check_needs(where: str, family: str, needs: frozenset[Need]) -> None:
    if family != "token" and needs_of(needs, "token"):
        expected = "family 'token' where needs is 'support' or 'full': those see slices of positions"
        raise UserError(where, expected, f"family {family!r}", "Combine them with `mix`.")
    if family == "token" and needs_of(needs, "row"):
        expected = "family 'sequence' or 'hybrid' where needs has rewards or groups: slices of positions have no rows"
        raise UserError(where, expected, "family 'token'", "Choose another family.")


_REGISTRY: dict[str, EstimatorSpec] = {}


def names() -> list[str]:
    """List the registered names, sorted."""
    return sorted(_REGISTRY)


def get(name: str | EstimatorFn) -> EstimatorSpec:
    """Find the specification of an estimator.

    Args:
        name: a registered name, `package.module:function`, `path/to/file.py:function`, or the function itself. A
            function that was not registered is taken as a `token` estimator that needs sampled tokens.

    Raises:
        UserError: no such name, module, file or function.
    """
    if callable(name):
        return _spec_of(name, getattr(name, "__name__", "estimator"))
    if not isinstance(name, str):
        expected = "a registered name, file.py:function or a function"
        raise UserError("estimator.name", expected, f"{name!r}, a {type(name).__name__}", "Pass one of them.")
    if name in _REGISTRY:
        return _REGISTRY[name]
    if ":" in name:
        return _spec_of(import_object("estimator.name", name), name)
    raise UserError("estimator.name", "a registered estimator or file.py:function", repr(name), suggest(name, names()))


def _spec_of(fn: EstimatorFn, name: str) -> EstimatorSpec:
    registered = next((spec for spec in _REGISTRY.values() if spec.fn is fn), None)
    with calling("estimator.name", "a function with a signature"):  # classes that are written in C have none
        inspect.signature(fn)
    return registered or EstimatorSpec(name, fn)
