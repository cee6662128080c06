"""Estimators: pure functions from a `TokenBatch` to an `Estimate`, each registered with its contract."""

from lit_opd.estimators import full, hybrid, sampled, sequence, support  # noqa: F401  (importing registers)
from lit_opd.estimators.registry import BoundEstimator, EstimatorSpec, build, get, names, register_estimator

__all__ = ["BoundEstimator", "EstimatorSpec", "build", "get", "names", "register_estimator"]
