"""Judge bias against variance from the gradients of single samples.

A gradient of the whole head is too large to keep for every sample: random features of it have the same inner products
on average. The adaptation of gamma and the command `measure` compare estimators by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast

__all__ = ["gradient_sketch", "squared_bias_and_variance"]


def squared_bias_and_variance(gradients_MSF: Tensor, unbiased: int) -> tuple[Tensor, Tensor]:
    """Estimate how far each of M estimators is off in expectation and by chance, from S samples of each.

    Both are unbiased estimates. The squared bias is the mean, over pairs of different samples, of the inner product of
    their differences from the unbiased estimator, so that noise is not counted as bias; it can come out negative. The
    variance is that of the mean over the S samples.

    Args:
        gradients_MSF: [M, S, F] the gradient (or a linear sketch of it) by estimator and sample; the samples are the
            same for all estimators.
        unbiased: which of the M is unbiased.

    Returns:
        Squared bias [M] and variance [M], in squared units of the gradients.

    Raises:
        ValueError: fewer than two samples.

    >>> unbiased, shifted = torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [6.0]])  # two samples of each
    >>> squared_bias_and_variance(torch.stack([unbiased, shifted]), unbiased=0)
    (tensor([0., 9.]), tensor([1., 1.]))
    """
    gradients = upcast(gradients_MSF)
    samples = gradients.shape[1]
    if samples < 2:
        raise ValueError(f"needs at least 2 samples, found {samples}")
    difference = gradients - gradients[unbiased]
    off_diagonal = difference.sum(1).square().sum(-1) - difference.square().sum((1, 2))
    centred = gradients - gradients.mean(1, keepdim=True)
    variance = centred.square().sum((1, 2)) / (samples - 1)
    return off_diagonal / (samples * (samples - 1)), variance / samples


def gradient_sketch(hidden_NH: Tensor, errors_NR: Tensor, projection_HR: Tensor) -> Tensor:
    """Sketch each position's contribution to the gradient of the head by random features, per unit of cost.

    The gradient of log p(y) by the head's weight is (s (onehot(y) - p)) h^T, with s the derivative of each logit by its
    projection: 1 where nothing scales or caps them. With random projections of both factors, inner products of sums of
    these features are unbiased estimates of those of the gradients.

    Args:
        hidden_NH: [N, H] last hidden states.
        errors_NR: [N, R] random projections of s (onehot(y) - p).
        projection_HR: [H, R] independent random signs over sqrt(R).

    Returns:
        [N, R * R] features.

    >>> gradient_sketch(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.ones(2, 1))
    tensor([[9.]])
    """
    return torch.einsum("nr,ns->nrs", errors_NR, upcast(hidden_NH) @ projection_HR).flatten(1)
