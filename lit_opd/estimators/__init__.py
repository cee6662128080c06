"""Estimators: pure functions from a `TokenBatch` to an `Estimate`, each registered with its contract."""

from lit_opd.estimators import (  # noqa: F401  (importing registers)
    adaptive,
    baselines,
    corrected,
    full,
    hybrid,
    mixtures,
    outcomes,
    reference,
    routing,
    sampled,
    selection,
    sequence,
    supervised,
    tails,
    targets,
    topk,
    trust,
    weighted,
)
from lit_opd.estimators.contract import BoundEstimator, Contract, EstimatorSpec, Term, Variant, any_clipped
from lit_opd.estimators.registry import get, names, register_estimator, register_mixture, register_weighting
from lit_opd.estimators.terms import as_estimator, build, build_from

__all__ = [
    "BoundEstimator",
    "Contract",
    "EstimatorSpec",
    "Term",
    "Variant",
    "any_clipped",
    "build",
    "as_estimator",
    "build_from",
    "get",
    "names",
    "register_estimator",
    "register_mixture",
    "register_weighting",
]
