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
from lit_opd.estimators.terms import build, build_from, build_given

__all__ = [
    "BoundEstimator",
    "Contract",
    "EstimatorSpec",
    "Term",
    "Variant",
    "any_clipped",
    "build",
    "build_from",
    "build_given",
    "get",
    "names",
    "register_estimator",
    "register_mixture",
    "register_weighting",
]
