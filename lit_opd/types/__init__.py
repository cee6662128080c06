"""Hold the values that flow through one training step, and the shape legend.

Every room hands these to the next one: data makes a `PromptBatch`, rollout a `Rollout`, teachers `Scores`, objective
the `TokenBatch` that an estimator turns into an `Estimate`.

Shape legend, used as name suffixes on floors 0 to 3:

    B  sequences (one completion of one prompt each)
    P  prompt positions, padded on the left
    T  completion positions, padded on the right
    K  support size: tokens compared at a position
    V  vocabulary
    N  counted positions, flattened
    H  hidden width

Every log-probability is in nats. In every mask True means counted.
"""

from lit_opd.types.rollouts import Author, Ended, FinishReason, PromptBatch, Prompts, Rollout, SamplingLaw
from lit_opd.types.scores import Distributions, ScoredRollout, Scores
from lit_opd.types.tokens import Estimate, Need, TokenBatch

__all__ = [
    "Author", "Distributions", "Ended", "Estimate", "FinishReason", "Need", "PromptBatch", "Prompts", "Rollout",
    "SamplingLaw", "ScoredRollout", "Scores", "TokenBatch",
]  # fmt: skip
