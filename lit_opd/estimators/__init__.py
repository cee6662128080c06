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
    support,
    tails,
    targets,
    trust,
    weighted,
)
from lit_opd.estimators.contract import BoundEstimator, Contract, EstimatorSpec, Term, Variant, any_clipped
from lit_opd.estimators.registry import build, get, names, register_estimator
from lit_opd.estimators.terms import register_mixture, register_weighting

__all__ = [
    "BoundEstimator",
    "Contract",
    "EstimatorSpec",
    "Term",
    "Variant",
    "any_clipped",
    "build",
    "get",
    "names",
    "register_estimator",
    "register_mixture",
    "register_weighting",
]
