"""Weighted sums of estimators.

A mix is how terms of several families train together: a configuration lists them as `estimator.terms`, and training
evaluates each where it is cheapest.

>>> from lit_opd.estimators import build
>>> estimator = build("mix", terms={"token": 0.5, "teacher_topk": {"weight": 1.0, "k": 8}})
>>> [(term.weight, term.estimator.spec.name) for term in estimator.terms]
[(0.5, 'token'), (1.0, 'teacher_topk')]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_mixture
from lit_opd.functional.ranges import allow, at_least

Terms = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def _check_terms(terms: Terms) -> None:
    if not isinstance(terms, Mapping | list | tuple) or not terms:
        raise ValueError(f"terms must map estimator names to weights, found {terms!r}")
    values = terms.values() if isinstance(terms, Mapping) else terms
    weights: list[Any] = [value.get("weight") if isinstance(value, Mapping) else value for value in values]
    if all(isinstance(weight, int | float) for weight in weights) and sum(weights) <= 0:
        raise ValueError("the weights of a mix must have a positive sum")


@register_mixture(
    "mix",
    source="weighted sums as in arXiv:2306.08543 (sequence + single-step), arXiv:2605.16826 (forward + reverse)",
    check=_check_terms,
    variants=(
        Variant({"terms": {"sequence": 1.0, "full_vocab": {"weight": 0.5, "divergence": "forward_kl"}}},
                "no default terms; these have a target of their own"),
        Variant({"terms": {"token": 0.25, "full_vocab": 0.75}}, "a convex combination of estimators of one target",
                target="reverse_kl", unbiased=True),
        Variant({"terms": {"token": 1.0, "teacher_topk": {"weight": 1.0, "k": 2}}}, "a score function and a support"),
    ),
)  # fmt: skip
def mix(*, terms: Terms) -> Terms:
    """Sum registered estimators with weights, whose bias and variance are those of the terms.

    Formula: loss_t = sum over terms of weight x loss_t of the term; the logged KL is their weighted mean.

    Args:
        terms: a list of `{name, weight, kwargs, weighting: {name, kwargs}}`, as under the key `estimator.terms`; or, in
            short, `{name: weight}` or `{name: {weight: w, keyword: value, ...}}`.
    """
    return terms


@register_mixture(
    "minillm",
    target="sequence_reverse_kl",
    source="MiniLLM, arXiv:2306.08543 (without teacher-mixed sampling, clipping and the language-modelling loss)",
    check=allow(single_step_weight=at_least(0)),
)
def minillm(*, single_step_weight: float = 1.0) -> Mapping[str, Any]:
    """Add the exact KL of the single step to the length-normalised return, for less noise where the cost is exact.

    Formula: the loss of `length_normalised` plus single_step_weight times KL(student || teacher) over the whole
    vocabulary. This token's own log-ratio stands in the return too, so that the single step counts twice.

    Args:
        single_step_weight: of the exact KL.
    """
    return {"length_normalised": 1.0, "full_vocab": single_step_weight}
