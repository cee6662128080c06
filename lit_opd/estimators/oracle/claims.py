"""Hold an estimator to what it declares: target, bias, and the gradient where there is nothing to learn.

They say nothing of an estimator that was not registered, and so declares nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from lit_opd.estimators.contract import BoundEstimator
from lit_opd.estimators.oracle import TARGETS, TabularPair, Verdict, exact_gradient, pair_for, verify
from lit_opd.estimators.oracle.batches import ROUNDING

__all__ = ["CLAIMS", "Law", "bias_is_as_declared", "gradient_at_equal_models_is_as_declared"]

Law = Callable[[BoundEstimator], str | None]


def bias_is_as_declared(estimator: BoundEstimator) -> str | None:
    """Compare the expected gradient with the target's: equal on all small models where unbiased, else not on all."""
    target, unbiased, _ = estimator.contract
    if target is None:
        return "it declares to be unbiased, but no target" if unbiased else None
    if target not in TARGETS:
        return f"its target {target!r} is unknown: known are {', '.join(TARGETS)}"
    # Where all completions of a small model have one reward, there is no gradient to compare with.
    pairs = [pair for pair in _tables(estimator, seed=1) if exact_gradient(pair, target).norm() > 1e-6]
    biases = [verify(estimator, pair).compare(target).relative_bias for pair in pairs]
    if not all(map(math.isfinite, biases)):
        return "its expected gradient is not finite"
    if unbiased and max(biases) > ROUNDING:
        return f"it declares the gradient of {target}, unbiased, but is off by {max(biases):.1%} of its norm"
    if not unbiased and max(biases) < 1e-6:
        return (
            f"it declares a biased gradient of {target}, but has exactly that of it: say unbiased=True, or by "
            "`small` with which keywords its limits are met here"
        )
    return None


def gradient_at_equal_models_is_as_declared(estimator: BoundEstimator) -> str | None:
    """Look for a gradient where the student equals the teacher, which an estimator must declare."""
    verdicts = [Verdict(estimator, pair) for pair in _tables(estimator, seed=2)]
    silent = all(verdict.rms_at_equal < ROUNDING for verdict in verdicts)
    centred = all(verdict.norm_at_equal < ROUNDING for verdict in verdicts)
    found = "sample" if silent else "expectation" if centred else "never"
    says = {"sample": "zero for every sample", "expectation": "zero in expectation only", "never": "not zero"}[found]
    return (
        None if found == estimator.contract.at_equal else f"at student == teacher it is {says}: say at_equal={found!r}"
    )


CLAIMS: dict[str, Law] = {law.__name__: law for law in (bias_is_as_declared, gradient_at_equal_models_is_as_declared)}


def _tables(estimator: BoundEstimator, seed: int) -> Iterator[TabularPair]:
    for horizon in (1, 3):
        for stop in (False, True):
            yield pair_for(estimator, seed, horizon, stop)
