"""Make small random batches that hold what an estimator declares to need and no more, and differentiate it on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from lit_opd.estimators.contract import BoundEstimator
from lit_opd.estimators.needs import Seen, fill
from lit_opd.estimators.oracle.tabular import pair_for
from lit_opd.types import Estimate, TokenBatch

ROUNDING = 1e-12
Surrogate = Callable[[TokenBatch], Estimate]


def vocabulary_for(estimator: BoundEstimator) -> int:
    """Tell V, more tokens than the estimator's support holds."""
    return pair_for(estimator).student_logits_CV.shape[1]


def example_batch(estimator: BoundEstimator, seed: int = 0) -> TokenBatch:
    """Make a [4, 5] float64 batch of two prompts of two rows, the last a demonstration, with holes and padding."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary_for(estimator)
    logits = torch.randn(2, 4, 5, vocabulary, generator=generator, dtype=torch.float64)
    student_BTV, teacher_BTV = logits.log_softmax(-1)
    return batch_of(estimator, student_BTV, teacher_BTV, torch.randint(vocabulary, (4, 5), generator=generator))


def batch_of(estimator: BoundEstimator, student_BTV: Tensor, teacher_BTV: Tensor, ids_BT: Tensor) -> TokenBatch:
    """Fill a batch from two models, [4, 5, V] log-probabilities, and the sampled tokens, [4, 5]."""
    student_BT, teacher_BT = (x.gather(-1, ids_BT[..., None]).squeeze(-1) for x in (student_BTV, teacher_BTV))
    wrote_BT = torch.tensor([True, True, True, False])[:, None].expand(ids_BT.shape)
    mask_BT = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    sampled = TokenBatch(student_BT, teacher_BT, student_BT + 0.01, mask_BT, ids_BT, wrote_BT, progress=0.25)
    widest = max((term.estimator for term in estimator.terms), key=lambda part: part.support_size)
    seen = Seen(
        student_BTV,
        teacher_BTV,
        k=widest.support_size,
        support=widest.support,
        reference_logps=(student_BT + teacher_BT) / 2 - 0.1,
        rewards_B=torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=student_BTV.dtype),
        groups_B=torch.tensor([4, 4, 7, 7]),
    )
    return fill(sampled, estimator.needs, seen)


def tensors(tokens: TokenBatch) -> dict[str, Tensor]:
    """Read the fields that hold a tensor."""
    return {f.name: value for f in fields(tokens) if isinstance(value := getattr(tokens, f.name), Tensor)}


def per_position(tokens: TokenBatch) -> list[str]:
    """Name the fields that hold values of positions, but for the mask."""
    return [name for name, value in tensors(tokens).items() if value.dim() > 1 and name != "mask_BT"]


def cast(tokens: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    """Cast all numbers to `dtype`."""
    values = {name: value.to(dtype) for name, value in tensors(tokens).items() if value.is_floating_point()}
    return replace(tokens, **values)  # type: ignore[arg-type]


def spoil_masked(tokens: TokenBatch, name: str, garbage: Callable[[Tensor], Tensor]) -> TokenBatch:
    """Put other values at the masked positions of one field."""
    value = getattr(tokens, name)
    mask = tokens.mask_BT.reshape(tokens.mask_BT.shape + (1,) * (value.dim() - 2))
    return replace(tokens, **{name: torch.where(mask, value, garbage(value))})  # type: ignore[arg-type]


def take_rows(tokens: TokenBatch, rows_B: Tensor) -> TokenBatch:
    """Take the chosen rows alone, as a smaller micro-batch would hold them."""
    return replace(tokens, **{name: value[rows_B] for name, value in tensors(tokens).items()})  # type: ignore[arg-type]


def with_leaves(tokens: TokenBatch) -> tuple[TokenBatch, dict[str, Tensor]]:
    """Put fresh leaves in the place of all student log-probabilities, and return them too."""
    values = {name: value for name, value in tensors(tokens).items() if "student" in name and "logps" in name}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    return replace(tokens, **leaves), leaves  # type: ignore[arg-type]


def loss_and_gradients(estimator: Surrogate, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the loss over counted positions, as training does, with its gradient on every student value."""
    tokens, leaves = with_leaves(tokens)
    loss = torch.where(tokens.mask_BT, estimator(tokens).loss_BT, 0.0).sum()
    if not loss.requires_grad:
        return loss, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def difference(estimator: Surrogate, one: TokenBatch, other: TokenBatch) -> str | None:
    """Say what the step from one batch to the other changes, loss or gradient, or None where it changes nothing."""
    (loss, gradients), (other_loss, other_gradients) = (loss_and_gradients(estimator, batch) for batch in (one, other))
    if not same(other_loss, loss):
        return "changes the loss"
    changed = [name for name, gradient in gradients.items() if not same(other_gradients[name], gradient)]
    return f"changes the gradient on {changed[0]}" if changed else None


def difference_where_masked(estimator: Surrogate, clean: TokenBatch, dirty: TokenBatch) -> str | None:
    """Say the `difference` between batches that differ at masked positions, where no gradient may be either."""
    if broken := difference(estimator, clean, dirty):
        return broken
    _, gradients = loss_and_gradients(estimator, dirty)
    leaking = [name for name, gradient in gradients.items() if not (gradient[~clean.mask_BT] == 0).all()]
    return f"gives a gradient on masked {leaking[0]}" if leaking else None


def same(found: Tensor, expected: Tensor) -> bool:
    """Compare two float64 tensors up to rounding, where no NaN equals another."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=ROUNDING)
