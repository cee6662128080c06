"""Ask an estimator for an estimate, and refuse what is none before broadcasting makes something else of it.

The objective asks here in every chunk of a training step, and the linter once on a made-up batch before weights load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.estimators.contract import BoundEstimator, Term
from lit_opd.estimators.undeclared import why_it_failed
from lit_opd.plugins import calling
from lit_opd.types import Estimate, TokenBatch

__all__ = ["ask", "ask_factors", "check_estimate"]

KEY = "estimator.name"


def ask(estimator: BoundEstimator, tokens: TokenBatch) -> Estimate:
    """Call an estimator on a batch or on a slice of positions, and check what it gives.

    Raises:
        UserError: it raises, or as of `check_estimate`.
    """
    try:
        with calling(KEY, f"{estimator.spec.name} to run"):
            estimate = estimator(tokens)
    except UserError as error:
        reason = why_it_failed(estimator, tokens, error.__cause__)
        raise UserError(error.key, error.expected, error.found, reason or error.remedy) from error.__cause__
    check_estimate(estimator.spec.name, estimate, tokens)
    return estimate


def check_estimate(name: str, estimate: Any, tokens: TokenBatch) -> None:
    """Check that the estimator `name` gave one value a position.

    Raises:
        UserError: another number of values, less precision than fp32 or the batch has, or a loss without a gradient.
    """
    if not isinstance(estimate, Estimate):
        found = type(estimate).__name__
        raise UserError(KEY, f"an Estimate(loss_BT, kl_BT) from {name}", found, "Return an Estimate of lit_opd.types.")
    for field in ("loss_BT", "kl_BT"):
        _check_values(f"{name} to return a {field}", getattr(estimate, field), tokens)
    if estimate.clipped_BT is not None:
        _check_shape(f"{name} to return a clipped_BT", estimate.clipped_BT, tokens)
        if estimate.clipped_BT.dtype != torch.bool:
            expected = f"{name} to return a clipped_BT of torch.bool"
            raise UserError(KEY, expected, estimate.clipped_BT.dtype, "Compare what a limit gives with what it got.")
    differentiable = tokens.student_logps_BT.requires_grad and torch.is_grad_enabled()
    if differentiable and not estimate.loss_BT.requires_grad:
        expected = f"{name} to return a loss_BT that depends on the student"
        raise UserError(KEY, expected, "one without a gradient", "Detach the credit and not log p of the student.")


def ask_factors(term: Term, tokens: TokenBatch) -> Tensor:
    """Weigh every token of a whole [B, T] batch as the term's weighting does, by one value a position.

    Raises:
        UserError: the weighting raises, or gives something else.
    """
    with calling(KEY, "the weighting to run"):
        factors_BT = term.factors(tokens)
    _check_values("a weighting to return factors", factors_BT, tokens)
    return factors_BT


def _check_values(expected: str, value: Any, tokens: TokenBatch) -> None:
    _check_shape(expected, value, tokens)
    wide = torch.promote_types(tokens.teacher_logps_BT.dtype, torch.float32)
    if not value.is_floating_point() or torch.promote_types(value.dtype, wide) != value.dtype:
        raise UserError(KEY, f"{expected} in {wide}", value.dtype, "Raise log-probabilities with lit_opd's `upcast`.")


def _check_shape(expected: str, value: Any, tokens: TokenBatch) -> None:
    shape = list(tokens.mask_BT.shape)
    if not isinstance(value, Tensor) or list(value.shape) != shape:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        expected = f"{expected} of shape {shape}, one value a position"
        raise UserError(KEY, expected, found, "Leave out sums and means: training takes them, over the whole step.")
