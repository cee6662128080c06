"""Differentiate rows of logits by kernels that read them as they are, without a copy in fp32.

What an estimator sees of a position is a few numbers: log-probabilities of chosen tokens, a divergence, entropies. A
first kernel makes them of the rows of both models. The estimator's own function makes a loss of them, autograd the
derivative of that loss by each number, and a second kernel the gradient by the student's rows, in their place. So an
estimator has one formula, here and in the plain path, which is the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.head import Head
from lit_opd.functional.precision import upcast

__all__ = ["Rows", "fused_rows"]

# Memory of both models' logits of a chunk, at most: more rows than that make the products hardly faster. A whole number
# of tiles of a product is taken of it.
_MOST_BYTES, _TILE = 640 * 2**20, 128
# Rows whose logits are raised to fp32 to find the most probable tokens.
_SORTED = 64


def fused_rows(rows: int, vocabulary: int) -> int:
    """Tell how many positions to project at once where no fp32 copies are made.

    Within the memory in which the plain path takes `rows` positions, which are ten copies in four bytes, fit ten times
    as many positions of two models in two bytes.

    >>> fused_rows(rows=700, vocabulary=151_936)
    1024
    >>> fused_rows(rows=3, vocabulary=151_936)
    30
    """
    fit = min(10 * rows, max(rows, _MOST_BYTES // (4 * vocabulary)))
    return fit if fit < _TILE else fit // _TILE * _TILE


class Rows:
    """Rows of the student's logits, and the teacher's beside them, read once.

    Args:
        student_cV: projection on the vocabulary, by which `differentiate` overwrites it.
        head: the student's, for its scale, cap and temperature.
        teacher: the teacher's projection [c, V] and head, None where a loss sees none of its distribution.
    """

    def __init__(self, student_cV: Tensor, head: Head, teacher: tuple[Tensor, Head] | None = None) -> None:
        from lit_opd.kernels import head_rows as kernels

        self._kernels, self._head = kernels, head
        self.student_cV, self.teacher = student_cV, teacher
        teacher_cV, teacher_head = teacher or (None, head)
        shapes = [kernels.Shape(x.scale, x.softcap or 0.0, 1 / x.temperature) for x in (head, teacher_head)]
        self._pair = kernels.Pair(student_cV, shapes[0], teacher_cV, shapes[1])
        self._read_6c = kernels.read_rows(self._pair)
        self.kl, self.forward_kl = self._read_6c[2:4]
        self._chosen: list[tuple[Tensor, Tensor]] = []
        self._divergence: tuple[str, float, Tensor, Tensor] | None = None

    def student_logps(self, ids_cK: Tensor) -> Tensor:
        """Read log-probabilities [c, K] of tokens, leaves that the loss is differentiated by."""
        logps_cK = _logps(self.student_cV, self._head, self._read_6c[0], ids_cK)
        self._chosen.append((ids_cK, logps_cK.requires_grad_(torch.is_grad_enabled())))
        return logps_cK

    def teacher_logps(self, ids_cK: Tensor) -> Tensor:
        """Read the teacher's log-probabilities [c, K] of tokens."""
        assert self.teacher is not None
        return _logps(*self.teacher, self._read_6c[1], ids_cK)

    def most_probable(self, k: int, teacher: bool) -> Tensor:
        """Find the K most probable tokens [c, K] of a model at each position, largest first."""
        logits_cV, head = self.teacher if teacher and self.teacher is not None else (self.student_cV, self._head)
        # In fp32 as in the plain path, whose order of equal logits it has.
        blocks = [head.shape_logits(upcast(block)).topk(k, dim=-1).indices for block in logits_cV.split(_SORTED)]
        return torch.cat(blocks) if blocks else torch.zeros(0, k, dtype=torch.long, device=logits_cV.device)

    def entropies(self) -> Tensor:
        """Compute the entropy of student and teacher at each position, nats [2, c]."""
        return self._kernels.read_rows(self._pair, entropies=True)[4:]

    def divergence(self, name: str, weight: float = 0.0) -> Tensor:
        """Compute a divergence at each position, nats [c], a leaf that the loss is differentiated by.

        Args:
            name: one of `kernels.head_rows.DIVERGENCES`.
            weight: the `teacher_weight`, `skew` or `forward_weight` of `divergences`, strictly between 0 and 1.
        """
        if self._divergence is None:
            known = {"reverse_kl": self.kl, "forward_kl": self.forward_kl}
            known["mixed_kl"] = weight * self.forward_kl + (1 - weight) * self.kl
            value_c, mean_c = known.get(name), self.kl
            if value_c is None:
                value_c, mean_c = self._kernels.sum_divergence(self._pair, self._read_6c[:2], name, weight)
            leaf_c = value_c.clone().requires_grad_(torch.is_grad_enabled())
            self._divergence = (name, weight, mean_c, leaf_c)
        assert self._divergence[:2] == (name, weight), "one for all terms: a kernel differentiates no second"
        return self._divergence[3]

    def differentiate(self, loss: Tensor) -> None:
        """Write the gradient of a loss of what was read by the student's projection into its place."""
        leaves = [logps_cK for _, logps_cK in self._chosen]
        leaves += [] if self._divergence is None else [self._divergence[3]]
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        slopes = [torch.zeros_like(x) if slope is None else slope for x, slope in zip(leaves, found, strict=True)]
        ids_cK = torch.cat([ids_cK for ids_cK, _ in self._chosen], dim=1)
        by_logps_cK = torch.cat(slopes[: len(self._chosen)], dim=1)
        divergence = None if self._divergence is None else (*self._divergence[:3], slopes[-1])
        self._kernels.write_gradient(self._pair, self._read_6c[:2], (ids_cK, by_logps_cK), divergence)


def _logps(logits_cV: Tensor, head: Head, normaliser_c: Tensor, ids_cK: Tensor) -> Tensor:
    return head.shape_logits(upcast(logits_cV.gather(-1, ids_cK))) - normaliser_c[:, None]
