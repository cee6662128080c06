"""Take gradients on the probe batch, of all of it and of groups of its completions, and test whether a mean is zero.

The null test, the sign test, the sampling law and the check of quantisation call it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_opd.lab.audit.evidence import Evidence
from lit_opd.measures.sketch import Sketch
from lit_opd.runs.verdicts import graded
from lit_opd.types import Estimate, TokenBatch

__all__ = ["FlipTest", "cosine", "flip_test", "gradient", "group_gradients", "norm", "sample_score"]

_GROUPS = 16
# A gradient is kept once for every group: that of a larger model as a sketch of so many numbers.
_SKETCH = 2**22
_FLIPS = 4095
_UNLIKELY, _IMPOSSIBLE = 1e-2, 1e-3


class FlipTest(NamedTuple):
    """A test of whether the mean of independent gradients differs from zero."""

    # Norm of their sum over its expected norm if each were as likely as its opposite; about 1 where the mean is zero.
    noise_ratio: float
    p_value: float  # how often random signs give a sum as long, or longer

    @property
    def verdict(self) -> str:
        """The verdict on a mean that has to be zero."""
        return graded(self.p_value, _UNLIKELY, _IMPOSSIBLE)

    def __str__(self) -> str:
        return f"{self.noise_ratio:.2f} times as long as noise (p = {self.p_value:.2g})"


def sample_score(tokens: TokenBatch) -> Estimate:
    """Take the log-probability of what was sampled as a loss: its gradient, the score, has mean zero on-policy."""
    return Estimate(tokens.student_logps_BT, torch.zeros_like(tokens.teacher_logps_BT))


def gradient(evidence: Evidence, index: Tensor | None = None, aggregation: str | None = None) -> list[Tensor]:
    """Take the estimator's gradient, by `evidence.parameters`, as a whole optimizer step would. No weight moves.

    It is that of some rows of the rollout, or of all, with tokens weighed as configured or by another aggregation.
    """
    rollout, distiller = evidence.rollout, evidence.distiller
    distiller = replace(distiller, aggregation=aggregation or distiller.aggregation)
    index = torch.arange(len(rollout)) if index is None else index
    counted = rollout.mask_BT[index.to(rollout.mask_BT.device)]
    tokens, sequences = counted.sum().float(), counted.any(1).sum().float()
    sums = [torch.zeros_like(p) for p in evidence.parameters]
    for micro in distiller.score(rollout, index):
        if not micro.rollout.mask_BT.any():
            continue
        weights_BT = distiller.weights(micro.rollout.mask_BT, tokens, sequences)
        with torch.enable_grad(), evidence.student.evaluating():
            loss = distiller.estimate(micro, weights_BT)
            parts = torch.autograd.grad(loss.value, evidence.parameters, allow_unused=True)
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part
    return sums


def group_gradients(evidence: Evidence) -> Tensor:
    """Take gradients [G, F] of independent groups of completions, each summed over its tokens, on the CPU.

    Sums and not means over tokens, because a mean divides by a length that depends on what was sampled. Those of large
    models are sketched, always by the same signs, so that inner products stand for the whole.
    """
    sketch = Sketch(evidence.parameters, _SKETCH, evidence.config.seed)
    return torch.stack([sketch(gradient(evidence, index, "sequence_sum")) for index in _groups(evidence)])


def _groups(evidence: Evidence) -> list[Tensor]:
    # Where completions of a prompt are compared, no group may depend on another through that.
    whole, rollout = evidence.distiller.whole_prompts, evidence.rollout
    unit_B = rollout.prompt_index_B.cpu() if whole else torch.arange(len(rollout))
    parts = unit_B.unique().tensor_split(_GROUPS)
    return [torch.nonzero(torch.isin(unit_B, part)).flatten() for part in parts if len(part)]


def flip_test(gradients_GF: Tensor) -> FlipTest:
    """Compare the norm of the sum of independent gradients [G, F] with its norms under random signs.

    The test is exact where each gradient is as likely as its opposite.
    """
    wide_GF = gradients_GF.double()
    gram_GG = wide_GF @ wide_GF.T
    generator = torch.Generator().manual_seed(0)
    signs_SG = torch.randint(2, (_FLIPS, len(gram_GG)), generator=generator).double() * 2 - 1
    observed, flipped_S = gram_GG.sum(), ((signs_SG @ gram_GG) * signs_SG).sum(1)
    as_long = int((flipped_S >= observed * (1 - 1e-9)).sum())
    ratio = float((observed / gram_GG.trace()).clamp(min=0).sqrt()) if gram_GG.trace() > 0 else 0.0
    return FlipTest(ratio, (1 + as_long) / (1 + _FLIPS))


def norm(tensors: list[Tensor]) -> float:
    """Compute the norm of all tensors together."""
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def cosine(first: list[Tensor], second: list[Tensor]) -> float:
    """Compute the cosine between two gradients, or 0 where one is zero."""
    inner = float(sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)))
    lengths = norm(first) * norm(second)
    return inner / lengths if lengths else 0.0
