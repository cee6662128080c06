"""Build estimators: bind and check their keywords, and write those made of others as the weighted terms they are.

A sum (`mix`, `minillm`), a weighting with its `base` (`tip`) and the list `estimator.terms` of a configuration all
become the same terms, which training, the oracle and the linter's probes evaluate one by one. Nothing here needs
weights: commands and the module build first and load models afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lit_opd.config import EstimatorConfig, as_section
from lit_opd.config.limits import as_type
from lit_opd.errors import UserError, choose, suggest
from lit_opd.estimators.contract import BoundEstimator, EstimatorFn, EstimatorSpec, Term
from lit_opd.estimators.registry import get, names
from lit_opd.functional.support import SUPPORTS
from lit_opd.types import Need

__all__ = ["build", "build_from", "build_given"]

_TERM = ("name", "weight", "kwargs", "weighting")
_WEIGHTING = ("name", "kwargs")


def build_from(section: EstimatorConfig) -> BoundEstimator:
    """Build the estimator that the section `estimator` of a configuration describes, by its name or by its terms.

    Raises:
        UserError: as of `build`, or both name and terms.
    """
    if not section.terms:
        return build(section.name, **section.kwargs)
    if section.name != "mix" or section.kwargs:
        found = f"the name {section.name!r} and the keywords {section.kwargs}"
        remedy = "Drop one, or set estimator.name=mix."
        raise UserError("estimator.terms", "neither estimator.name nor estimator.kwargs beside it", found, remedy)
    try:
        return build("mix", terms=section.terms)
    except UserError as error:
        key = "estimator.terms" if error.key == "estimator.kwargs" else error.key
        raise UserError(key, error.expected, error.found, error.remedy) from error


def build_given(estimator: Any, keywords: Any = None) -> BoundEstimator:
    """Build what a script gives: a section `estimator` or its keys, a name or a function with keywords, or one built.

    Raises:
        UserError: as of `build_from` and `build`.
    """
    if isinstance(estimator, EstimatorConfig | Mapping):
        return build_from(as_section(EstimatorConfig, estimator, "estimator"))
    if isinstance(estimator, BoundEstimator):
        return estimator
    return build(estimator, **as_type("estimator.kwargs", keywords or {}, dict[str, Any]))


def build(name: str | EstimatorFn, /, **kwargs: Any) -> BoundEstimator:
    """Bind and check the keywords of an estimator, named as in `get`, without any weights of models.

    Raises:
        UserError: an unknown or missing keyword, or a value that cannot work.
    """
    spec = get(name)
    known = spec.defaults
    for key in kwargs:
        if key not in known:
            remedy = suggest(key, known) if known else f"{spec.name} takes none."
            raise UserError(f"estimator.kwargs.{key}", f"a keyword of {spec.name}", "an unknown one", remedy)
    try:
        bound = spec.bind(kwargs)
        if spec.check is not None:
            spec.check(**bound)
        estimator = BoundEstimator(spec, kwargs, _parts(spec, bound))
    except UserError:
        raise
    except Exception as error:  # most are of checks, the others of a user's own function
        told = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
        raise UserError("estimator.kwargs", f"valid keywords for {spec.name}", told, "Correct them.") from error
    if Need.SUPPORT in spec.needs:
        if "k" not in bound:
            raise UserError(
                "estimator.name", "a keyword `k`, the support size", f"none in {spec.name}", "Add `k: int`."
            )
        choose("estimator.kwargs.support", str(bound.get("support", "teacher")), SUPPORTS)
    return estimator


def _parts(spec: EstimatorSpec, keywords: dict[str, Any]) -> tuple[Term, ...]:
    """Write what is made of others as terms, none for what stands for itself."""
    if spec.kind == "estimator":
        return ()
    if spec.kind == "weighting":
        own = {key: value for key, value in keywords.items() if key != "base"}
        return _weighted(spec, own, _base(keywords["base"]).terms)
    parts = spec.fn(**keywords)
    if isinstance(parts, Mapping):
        return tuple(term for name, value in parts.items() for term in _read_short(name, value))
    return tuple(term for i, part in enumerate(parts) for term in _read_term(f"estimator.terms[{i}]", part))


def _weighted(spec: EstimatorSpec, keywords: dict[str, Any], terms: tuple[Term, ...]) -> tuple[Term, ...]:
    weighting = functools.partial(spec.fn, **keywords)
    return tuple(Term(term.weight, term.estimator, weighting, spec.needs) for term in terms)


def _base(base: str | Mapping[str, Any]) -> BoundEstimator:
    keywords = dict(base) if isinstance(base, Mapping) else {"name": base}
    if "name" not in keywords:
        raise ValueError(f"base must be a name, or a mapping with the key name, found {base!r}")
    estimator = build(keywords.pop("name"), **keywords)
    if any(term.weighting is not None for term in estimator.terms):
        raise ValueError(f"base must not be weighted itself, found {base!r}")
    return estimator


def _read_short(name: str, value: Any) -> tuple[Term, ...]:
    """Read `name: weight` or `name: {weight: w, keyword: value}`."""
    keywords = dict(value) if isinstance(value, Mapping) else {"weight": value}
    return _term(name, keywords.pop("weight", None), keywords)


def _read_term(key: str, part: Any) -> tuple[Term, ...]:
    """Read `{name, weight, kwargs, weighting: {name, kwargs}}`, which stands at `key`."""
    _check_keys(key, part, _TERM)
    terms = _at(key, _term, part["name"], part.get("weight"), part.get("kwargs") or {})
    wanted = part.get("weighting")
    if wanted is None:
        return terms
    _check_keys(f"{key}.weighting", wanted, _WEIGHTING)
    choose(f"{key}.weighting.name", wanted["name"], [name for name in names() if get(name).kind == "weighting"])
    if any(term.weighting is not None for term in terms):
        raise UserError(f"{key}.weighting", "none", f"one beside the weighting {part['name']!r}", "Drop one of them.")
    keywords = _at(f"{key}.weighting", build, wanted["name"], **(wanted.get("kwargs") or {})).keywords
    own = {name: value for name, value in keywords.items() if name != "base"}
    return _weighted(get(wanted["name"]), own, terms)


def _term(name: str, weight: Any, keywords: Mapping[str, Any]) -> tuple[Term, ...]:
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise ValueError(f"term {name!r} needs a number as its weight, found {weight!r}")
    if get(name).kind == "mixture":
        raise ValueError(f"a mix cannot hold a mix, found {name!r}: list the terms side by side")
    return tuple(term._replace(weight=weight * term.weight) for term in build(name, **keywords).terms)


def _check_keys(key: str, part: Any, known: tuple[str, ...]) -> None:
    if not isinstance(part, Mapping) or "name" not in part:
        raise UserError(key, f"a mapping with the key name, of {', '.join(known)}", repr(part), "Name one.")
    for word in part:
        if word not in known:
            raise UserError(
                f"{key}.{word}", f"a key of {', '.join(known)}", "an unknown one", suggest(str(word), known)
            )


def _at(key: str, made: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `made`, and tell of what is wrong where in the list it stands."""
    try:
        return made(*args, **kwargs)
    except UserError as error:
        raise UserError(error.key.replace("estimator", key, 1), error.expected, error.found, error.remedy) from error
