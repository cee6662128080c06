"""The registry: how an estimator is found by name or path, and how its keywords are bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lit_opd.errors import UserError, choose, suggest
from lit_opd.estimators.contract import BoundEstimator, EstimatorFn, EstimatorSpec, Term, Variant, bound_arguments
from lit_opd.estimators.needs import needs_of, read_needs
from lit_opd.functional.topk import SUPPORTS
from lit_opd.plugins import import_object
from lit_opd.types import Need

__all__ = ["build", "get", "names", "register_estimator"]

F = TypeVar("F", bound=EstimatorFn)

FAMILIES = ("token", "sequence", "hybrid")
AT_EQUAL = ("sample", "expectation", "never")


def register_estimator(
    name: str,
    *,
    family: str = "token",
    target: str | None = None,
    unbiased: bool = False,
    needs: str = "token",
    source: str = "",
    check: Callable[..., None] | None = None,
    at_equal: str = "sample",
    on_policy: bool | None = None,
    corrects: bool = False,
    variants: tuple[Variant, ...] = (),
    split: Callable[..., tuple[Term, ...]] | None = None,
) -> Callable[[F], F]:
    """Register a pure function `(tokens: TokenBatch, *, ...) -> Estimate` under a name, with its contract.

    Args:
        name: how a configuration selects it.
        family: `token`, `sequence` or `hybrid`.
        target: whose gradient it aims at, e.g. `reverse_kl`, `sequence_reverse_kl`; None claims nothing.
        unbiased: whether its expected gradient is exactly the target's, on-policy.
        needs: `token`, `support` or `full`, with any of `+kl`, `+entropy`, `+rewards`, `+groups`, `+reference`.
        source: citation.
        check: called with the keywords; raises ValueError where they cannot work.
        at_equal: where student == teacher, the gradient is zero for every `sample`, in `expectation`, or `never`.
        on_policy: whether it is right only where the student itself wrote the tokens; by default where it needs no more
            than these.
        corrects: whether it weighs tokens by student over sampler.
        variants: keywords with which the contract is another, or which deserve a test of their own.
        split: what it is made of; `register_mixture` and `register_weighting` set it.

    Raises:
        UserError: an unknown family or need, a name already taken by another function, or a `token` estimator that
            asks for what belongs to rows, or another that asks for more than tokens: what is called on slices of
            positions sees no rows, and only that may see a support or the vocabulary.
    """
    where = f"register_estimator({name!r})"
    choose(f"{where}.at_equal", at_equal, AT_EQUAL)
    choose(f"{where}.family", family, FAMILIES)
    wanted = read_needs(f"{where}.needs", needs)
    _check_needs(where, family, wanted)

    def register(fn: F) -> F:
        taken = _REGISTRY.get(name)
        if taken is not None and inspect.getsourcefile(taken.fn) != inspect.getsourcefile(fn):
            raise UserError(where, "a new name", "a registered one", "Choose another name.")
        sampled = Need.TOKEN in wanted if on_policy is None else on_policy
        _REGISTRY[name] = EstimatorSpec(
            name, fn, family, target, unbiased, wanted, source, check, at_equal, sampled, corrects, variants, split
        )
        return fn

    return register


def _check_needs(where: str, family: str, needs: frozenset[Need]) -> None:
    if family != "token" and needs_of(needs, "token"):
        expected = "family 'token' where needs is 'support' or 'full': those see slices of positions"
        raise UserError(where, expected, f"family {family!r}", "Combine them with `mix`.")
    if family == "token" and needs_of(needs, "row"):
        expected = "family 'sequence' or 'hybrid' where needs has rewards or groups: slices of positions have no rows"
        raise UserError(where, expected, "family 'token'", "Choose another family.")


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
        return _spec_of(import_object("estimator.name", name), name)
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
        bound = bound_arguments(spec.fn, kwargs)
        if spec.check is not None:
            spec.check(**bound)
        estimator = BoundEstimator(spec, kwargs)
        _ = estimator.terms  # builds, and so checks, what it is made of
    except (TypeError, ValueError) as error:
        raise UserError("estimator.kwargs", f"valid keywords for {spec.name}", str(error), "Correct them.") from error
    if Need.SUPPORT in spec.needs:
        if "k" not in bound:
            raise UserError(
                "estimator.name", "a keyword `k`, the support size", f"none in {spec.name}", "Add `k: int`."
            )
        choose("estimator.kwargs.support", str(bound.get("support", "teacher")), SUPPORTS)
    return estimator


def _spec_of(fn: EstimatorFn, name: str) -> EstimatorSpec:
    registered = next((spec for spec in _REGISTRY.values() if spec.fn is fn), None)
    return registered or EstimatorSpec(name, fn)


def _keywords(fn: EstimatorFn) -> list[str]:
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
