"""Estimators: pure functions from a `TokenBatch` to an `Estimate`, each registered with its contract.

What holds for all of them is said here, and their docstrings tell the rest. An estimator finds in the batch what it
declares to need, log-probabilities in nats, [B, T] or, in the family `token`, a slice of positions [N]. It returns a
loss of the same shape to differentiate, and an estimate of the reverse KL to log: the exact one where it is given whole
distributions or that KL, else the log-ratio of the sampled token. A weighting returns weights [B, T], a mixture its
terms.
"""

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
