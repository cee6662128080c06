"""Find the exact gradient an estimator has, by writing down every completion there is.

On a tabular model with a few tokens and a few positions all completions can be enumerated, so the expected gradient
and the variance of an estimator are finite sums: float64 rounding is the only error, and "unbiased" becomes a yes or
a no. The objectives themselves are computed from the same tables by other means, in `objectives`. `laws` holds an
estimator to what every estimator must keep and to what it declares, `verdict` says what it does whatever it declares.
"""

from lit_opd.estimators.oracle.objectives import TARGETS, exact_gradient
from lit_opd.estimators.oracle.samples import (
    Completions,
    Gradients,
    expected_gradient,
    sample_gradients,
    second_moment,
    trace_variance,
    trajectory_gradients,
)
from lit_opd.estimators.oracle.tabular import TabularPair, pair_for
from lit_opd.estimators.oracle.verdict import Comparison, Verdict, declared_target, verify

__all__ = [
    "TARGETS",
    "Comparison",
    "Completions",
    "Gradients",
    "TabularPair",
    "Verdict",
    "declared_target",
    "exact_gradient",
    "expected_gradient",
    "pair_for",
    "sample_gradients",
    "second_moment",
    "trace_variance",
    "trajectory_gradients",
    "verify",
]
