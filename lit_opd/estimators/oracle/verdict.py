"""An estimator against its declared target."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lit_opd.estimators.contract import BoundEstimator
from lit_opd.estimators.oracle.objectives import exact_gradient
from lit_opd.estimators.oracle.samples import expected_gradient, second_moment, trace_variance
from lit_opd.estimators.oracle.tabular import TabularPair

__all__ = ["Verdict", "declared_target", "pair_for", "verify"]


class Verdict(NamedTuple):
    """What the oracle found; the first four are None where the estimator declares no target.

    Attributes:
        target: whose gradient it was compared with.
        relative_bias: norm of (expected gradient - target gradient), over that of the target.
        cosine: between the two.
        is_unbiased: `relative_bias` below 1e-10.
        trace_variance: of one completion's gradient.
        norm_at_equal: norm of the expected gradient where the student equals the teacher.
        rms_at_equal: root of the second moment there: zero only if no single completion has a gradient.
    """

    target: str | None
    relative_bias: float | None
    cosine: float | None
    is_unbiased: bool | None
    trace_variance: float
    norm_at_equal: float
    rms_at_equal: float


def declared_target(estimator: BoundEstimator) -> str | None:
    """The target an estimator declares with its keywords."""
    return estimator.contract.target


def pair_for(estimator: BoundEstimator, seed: int = 0) -> TabularPair:
    """Random models small enough to enumerate, with more tokens than the estimator's support."""
    vocabulary = max(4, *(term.estimator.support_size + 2 for term in estimator.terms))
    horizon = 3 if vocabulary <= 6 else 2 if vocabulary <= 40 else 1
    return TabularPair.random(vocabulary, horizon, seed, stop=True)


def verify(estimator: BoundEstimator, pair: TabularPair | None = None, target: str | None = None) -> Verdict:
    """Compare an estimator's expected gradient with its target's; by default the declared one, on `pair_for` it."""
    pair, target = pair or pair_for(estimator), target or declared_target(estimator)
    equal = pair.with_equal_models()
    norm_at_equal = float(expected_gradient(equal, estimator).norm())
    spread = (trace_variance(pair, estimator), norm_at_equal, second_moment(equal, estimator) ** 0.5)
    if target is None:
        return Verdict(None, None, None, None, *spread)
    found = expected_gradient(pair, estimator)
    wanted = exact_gradient(pair, target, **_target_keywords(estimator))
    bias = float((found - wanted).norm() / wanted.norm())
    return Verdict(target, bias, float(torch.cosine_similarity(found, wanted, dim=0)), bias < 1e-10, *spread)


def _target_keywords(estimator: BoundEstimator) -> dict[str, float]:
    return {name: estimator.keywords[name] for name in ("teacher_weight", "skew") if name in estimator.keywords}
