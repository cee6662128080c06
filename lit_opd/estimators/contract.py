"""Hold what an estimator declares of itself, and bind its keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_opd.types import Estimate, Need, TokenBatch

EstimatorFn = Callable[..., Estimate]
Mixture = Callable[..., Mapping[str, Any] | Sequence[Mapping[str, Any]]]
Weighting = Callable[..., Tensor]

BASE = "token"  # what a weighting weighs if nothing else is named


class Contract(NamedTuple):
    """The promise of an estimator, to whose every word tests and `check` hold it.

    Attributes:
        target: whose gradient it aims at, or None where it changes the optimum on purpose or declares nothing.
        unbiased: is its expected gradient exactly the target's, on-policy?
        at_equal: where student == teacher, the gradient is zero for every `sample`, in `expectation`, or `never`.
    """

    target: str | None
    unbiased: bool
    at_equal: str

    @property
    def aim(self) -> str | None:
        """The gradient that is aimed at, in words, None where none is declared."""
        return f"the gradient of {self.target}, {'unbiased' if self.unbiased else 'biased'}" if self.target else None


@dataclass(frozen=True)
class Variant:
    """Keywords that deserve a test of their own, and the contract with them.

    Attributes:
        keywords: the keywords; the others keep their defaults.
        reason: why this row is here.
        target, unbiased, at_equal: of the contract, None where they are as declared.
    """

    keywords: Mapping[str, Any]
    reason: str
    target: str | None = None
    unbiased: bool | None = None
    at_equal: str | None = None


@dataclass(frozen=True)
class EstimatorSpec:
    """An estimator and the contract it declares, as the arguments of `registry.register_estimator` describe it.

    A function that was not registered is named by its path. A sum has no needs of its own, and is given those of its
    terms.
    """

    name: str
    fn: Callable[..., Any]
    family: str = "token"
    target: str | None = None
    unbiased: bool = False
    needs: frozenset[Need] = frozenset({Need.TOKEN})
    source: str = ""
    check: Callable[..., None] | None = field(default=None, repr=False)
    at_equal: str = "sample"
    on_policy: bool = True
    corrects: bool = False
    variants: tuple[Variant, ...] = field(default=(), repr=False)
    small: Mapping[str, Any] = field(default_factory=dict, repr=False)
    kind: Literal["estimator", "mixture", "weighting"] = "estimator"

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.fn) or "").split("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """The keywords it takes and their defaults, `inspect.Parameter.empty` where one has none."""
        parameters = inspect.signature(self.fn).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return own | {"base": BASE} if self.kind == "weighting" else own

    def bind(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the given keywords by the defaults of the others.

        Raises:
            TypeError: one is missing.
        """
        own = {key: value for key, value in kwargs.items() if self.kind != "weighting" or key != "base"}
        batch = () if self.kind == "mixture" else (None,)
        bound = inspect.signature(self.fn).bind(*batch, **own)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[len(batch) :])
        return arguments | {"base": kwargs.get("base", BASE)} if self.kind == "weighting" else arguments

    def contract(self, keywords: Mapping[str, Any]) -> Contract:
        """Find the contract with the given keywords, the first variant's they agree with, else the declared one."""
        for variant in self.variants:
            if all(keywords.get(key) == value for key, value in variant.keywords.items()):
                return Contract(
                    variant.target or self.target,
                    self.unbiased if variant.unbiased is None else variant.unbiased,
                    variant.at_equal or self.at_equal,
                )
        return Contract(self.target, self.unbiased, self.at_equal)


@dataclass(frozen=True)
class BoundEstimator:
    """An estimator with its keywords, which maps a `TokenBatch` to an `Estimate`.

    Attributes:
        spec: the function and what it declares.
        kwargs: the keywords that were given.
        parts: the terms that it sums; none where it stands for itself.
    """

    spec: EstimatorSpec
    kwargs: Mapping[str, Any]
    parts: tuple[Term, ...] = ()

    def __call__(self, tokens: TokenBatch) -> Estimate:
        """Apply the estimator."""
        return _sum(self.parts, tokens) if self.parts else self.spec.fn(tokens, **self.kwargs)

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """All keywords, with defaults for those that were not given."""
        return self.spec.bind(self.kwargs)

    @property
    def contract(self) -> Contract:
        """The promise with these keywords, which is none where a weighting has another base."""
        if self.spec.kind != "weighting" or self.keywords["base"] == BASE:
            return self.spec.contract(self.keywords)
        at_equal = {term.estimator.contract.at_equal for term in self.terms}
        return Contract(None, False, max(at_equal, key=("sample", "expectation", "never").index))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The weighted estimators it is made of, for most nothing but itself."""
        return self.parts or (Term(1.0, self),)

    @property
    def needs(self) -> frozenset[Need]:
        """The needs of its terms and their weightings together."""
        return frozenset[Need]().union(*(term.needs for term in self.terms))

    @property
    def support(self) -> str:
        """The model whose most probable tokens are compared, by convention its keyword `support`."""
        return str(self.keywords.get("support", "teacher"))

    @property
    def support_size(self) -> int:
        """The support size, by convention its keyword `k`, or 0 where it compares no support."""
        return int(self.keywords["k"]) if Need.SUPPORT in self.spec.needs else 0

    @property
    def largest_support(self) -> int:
        """Largest K among the terms that compare a support, 0 where none does."""
        return max(term.estimator.support_size for term in self.terms)


class Term(NamedTuple):
    """A part of a sum.

    Attributes:
        weight: its factor.
        estimator: one without terms of its own.
        weighting: maps a whole [B, T] batch to the factor of every token, detached; None for one everywhere.
        weighting_needs: what the weighting wants to see.
    """

    weight: float
    estimator: BoundEstimator
    weighting: Callable[[TokenBatch], Tensor] | None = None
    weighting_needs: frozenset[Need] = frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """The needs of estimator and weighting together."""
        return self.estimator.spec.needs | self.weighting_needs

    @property
    def is_local(self) -> bool:
        """True where the estimator may be called on slices of positions."""
        return self.estimator.spec.family == "token"

    def factors(self, tokens: TokenBatch) -> Tensor:
        """Weigh every token of a whole [B, T] batch by a detached factor."""
        return torch.ones_like(tokens.teacher_logps_BT) if self.weighting is None else self.weighting(tokens).detach()

    def __call__(self, tokens: TokenBatch) -> Estimate:
        """Estimate on a whole [B, T] batch, weighted token by token but not by `weight`."""
        estimate = self.estimator(tokens)
        return estimate if self.weighting is None else estimate.weighted(self.factors(tokens))


def any_clipped(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Find where any of the terms of a sum is clipped, or None where none sets a limit."""
    known = [clipped for clipped in parts if clipped is not None]
    return reduce(torch.logical_or, known) if known else None


def _sum(terms: tuple[Term, ...], tokens: TokenBatch) -> Estimate:
    estimates = [(term.weight, term(tokens)) for term in terms]
    share = sum(weight for weight, _ in estimates)
    loss = sum(weight * estimate.loss_BT for weight, estimate in estimates)
    kl = sum(weight * estimate.kl_BT for weight, estimate in estimates)
    clipped = any_clipped(estimate.clipped_BT for _, estimate in estimates)
    return Estimate(loss_BT=loss, kl_BT=kl / share, clipped_BT=clipped)  # type: ignore[arg-type]
