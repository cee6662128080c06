"""Drawing tokens: the law in force, and an inverse-CDF draw from given uniforms.

Drawing by inverse CDF makes a sample a function of (distribution, uniform number). Given one stream of uniforms for
each row, what a row writes depends neither on its neighbours in the batch nor on how many processes share the work,
and two models sampled with the same stream share their randomness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast
from lit_opd.types import SamplingLaw

__all__ = ["draw", "law_logps"]


def law_logps(logits_BV: Tensor, law: SamplingLaw, forbidden_ids: Tensor | None = None) -> Tensor:
    """Log-probabilities of the next token under the sampling law.

    Args:
        logits_BV: [B, V] unnormalised.
        law: temperature and truncation. Temperature 0 is greedy: all mass on the largest logit.
        forbidden_ids: [F] tokens that may not be drawn here (the stop tokens before `min_new_tokens`).

    Returns:
        [B, V] nats in fp32 (float64 stays), -inf at tokens that the law excludes.
    """
    logits = upcast(logits_BV)
    if forbidden_ids is not None:
        logits = logits.index_fill(-1, forbidden_ids, -torch.inf)
    if law.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logps = torch.log_softmax(logits / law.temperature, dim=-1)
    if law.top_k == 0 and law.top_p == 1 and law.min_p == 0:
        return logps
    if 0 < law.top_k < logps.shape[-1]:
        smallest_kept = logps.topk(law.top_k, dim=-1).values[:, -1:]
        logps = _keep(logps, logps >= smallest_kept)
    if law.top_p < 1:
        logps = _keep(logps, _nucleus(logps, law.top_p))
    if law.min_p > 0:
        floor = logps.amax(-1, keepdim=True) + torch.tensor(law.min_p, dtype=logps.dtype).log()
        logps = _keep(logps, logps >= floor)
    return logps


def _keep(logps_BV: Tensor, kept_BV: Tensor) -> Tensor:
    return torch.log_softmax(logps_BV.masked_fill(~kept_BV, -torch.inf), dim=-1)


def _nucleus(logps_BV: Tensor, top_p: float) -> Tensor:
    sorted_logps, order = logps_BV.sort(dim=-1, descending=True)
    mass_before = sorted_logps.exp().cumsum(-1) - sorted_logps.exp()
    kept_sorted = mass_before < top_p
    return torch.zeros_like(kept_sorted).scatter(-1, order, kept_sorted)


def draw(logps_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logps_BV: [B, V] log-probabilities; tokens at -inf are never drawn.
        uniforms_B: [B] float64 numbers in [0, 1).

    Returns:
        [B] token ids.
    """
    # float64: over 150k tokens an fp32 running sum would lose the tail.
    cdf_BV = logps_BV.exp().double().cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    # Strictly below the total, or rounding could choose a token behind the last possible one.
    targets_B1 = torch.minimum(uniforms_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cdf_BV, targets_B1, right=True).squeeze(1)
