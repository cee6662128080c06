"""Make the law that training samples with, and refuse one under which nothing could be learned.

The training module and `measure` ask for it before any model samples.
"""

from __future__ import annotations

from lit_opd.config import RolloutConfig
from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.types import SamplingLaw

__all__ = ["training_law"]


def training_law(config: RolloutConfig, estimator: BoundEstimator) -> SamplingLaw:
    """Make the configured sampling law.

    Raises:
        UserError: greedy sampling, for an estimator that weighs samples by their probability.
    """
    if config.temperature == 0:
        for term in estimator.terms:
            if term.estimator.spec.on_policy:
                expected = f"above 0 for {term.estimator.spec.name!r}, which learns from what it samples"
                raise UserError("rollout.temperature", expected, 0, "Set rollout.temperature=1.")
    return SamplingLaw(config.temperature, config.top_p, config.top_k, config.min_p, config.min_new_tokens)
