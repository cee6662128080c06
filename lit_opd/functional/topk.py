"""Which tokens are compared at a position."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SUPPORTS", "choose_support"]

SUPPORTS = ("teacher", "student", "union", "intersection")


def choose_support(student_logps: Tensor, teacher_logps: Tensor, k: int, source: str) -> tuple[Tensor, Tensor]:
    """The K most probable tokens of the teacher, of the student, or of both.

    Args:
        student_logps: [..., V] log-probabilities.
        teacher_logps: [..., V] log-probabilities.
        k: K, how many of each model.
        source: one of `SUPPORTS`.

    Returns:
        Token ids and the mask of the slots that hold one: [..., K], for the union [..., 2K]. No token stands twice.

    Raises:
        ValueError: an unknown source.
    """
    if source not in SUPPORTS:
        raise ValueError(f"support must be one of {', '.join(SUPPORTS)}, found {source!r}")
    if source == "student":
        ids = student_logps.topk(k, dim=-1).indices
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids = teacher_logps.topk(k, dim=-1).indices
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    if source == "teacher":
        return ids, everywhere
    others = student_logps.topk(k, dim=-1).indices
    shared = ids[..., :, None] == others[..., None, :]
    if source == "intersection":
        return ids, shared.any(-1)
    return torch.cat([ids, others], dim=-1), torch.cat([everywhere, ~shared.any(-2)], dim=-1)
