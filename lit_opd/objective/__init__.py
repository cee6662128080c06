"""Turn a scored rollout into a loss, through the terms of an estimator.

`Distiller.estimate` calls `student_loss`, so training and every experiment learn from the same objective.
"""

from lit_opd.objective.counted import Chunk, CountedPositions
from lit_opd.objective.head_proof import FUSED_HEAD, prove_head
from lit_opd.objective.loss import Loss, sequence_tokens, student_loss, support_masses

__all__ = [
    "FUSED_HEAD",
    "Chunk",
    "CountedPositions",
    "Loss",
    "prove_head",
    "sequence_tokens",
    "student_loss",
    "support_masses",
]
