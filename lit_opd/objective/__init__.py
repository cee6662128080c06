"""The objective: from a scored rollout to a loss, through an estimator's terms."""

from lit_opd.objective.loss import Loss, sequence_tokens, student_loss, support_masses
from lit_opd.objective.positions import Chunk, CountedPositions

__all__ = ["Chunk", "CountedPositions", "Loss", "sequence_tokens", "student_loss", "support_masses"]
