"""Turn per-token losses into one number, by weights whose denominators are counts of the whole optimizer step.

A mean over a micro-batch would make the objective depend on how a step is cut up. The training step asks for weights
before its first micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast

__all__ = ["masked_mean", "token_weights"]


def token_weights(mask_BT: Tensor, aggregation: str, tokens: Tensor, sequences: Tensor) -> Tensor:
    """Weigh every token, so that loss = sum of weight x per-token loss.

    Because the counts are those of the whole optimizer step over all processes, the sum over micro-batches and
    processes does not depend on how the step was cut up.

    Args:
        mask_BT: [B, T] True at counted tokens.
        aggregation: `token_mean` (1 / tokens), `sequence_mean` (1 / own length / sequences) or `sequence_sum`
            (1 / sequences).
        tokens: scalar, counted tokens of the whole step.
        sequences: scalar, sequences with at least one counted token in the whole step.

    Returns:
        [B, T] weights in fp32 (float64 where the counts are), zero where masked.

    Raises:
        ValueError: an unknown aggregation.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> token_weights(mask, "sequence_mean", tokens=torch.tensor(3), sequences=torch.tensor(2))
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    mask = mask_BT.to(upcast(tokens).dtype)
    if aggregation == "token_mean":
        return mask / tokens.clamp(min=1)
    if aggregation == "sequence_mean":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / sequences.clamp(min=1)
    if aggregation == "sequence_sum":
        return mask / sequences.clamp(min=1)
    raise ValueError(f"aggregation must be token_mean, sequence_mean or sequence_sum, found {aggregation!r}")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average counted positions in fp32, with zero where none is counted.

    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    kept = torch.where(mask, upcast(values), 0.0)
    return kept.sum() / mask.sum().clamp(min=1)
