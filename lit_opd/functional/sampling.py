"""Draw tokens by a sampling law, each by inverting its cumulative distribution at a given uniform number.

Inversion makes a sample a function of (distribution, uniform number). Given one stream of uniforms for
each row, what a row writes depends neither on its neighbours in the batch nor on how many processes share the work,
and two models sampled with the same stream share their randomness. The local rollout engine calls this at every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.precision import upcast
from lit_opd.types import SamplingLaw

__all__ = ["draw", "law_logps", "sample_tokens"]

# Tokens whose probabilities are summed before the sums are: the running sum is short, and still exact enough.
_BLOCK = 128


def sample_tokens(
    logits_BV: Tensor, law: SamplingLaw, uniforms_B: Tensor, forbidden_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row and say how probable it was.

    Args:
        logits_BV: [B, V] unnormalised.
        law: temperature and truncation.
        uniforms_B: [B] float64 numbers in [0, 1).
        forbidden_ids: [F] tokens that may not be drawn here (the stop tokens before `min_new_tokens`).

    Returns:
        Token ids [B], and their log-probabilities [B] under the law, nats in fp32 (float64 stays).

    >>> logits = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> ids, logps = sample_tokens(logits, SamplingLaw(top_k=1), torch.tensor([0.9]).double())
    >>> ids, logps.exp()
    (tensor([1]), tensor([1.]))
    """
    if law.temperature == 0 or law.truncates:
        logps_BV = law_logps(logits_BV, law, forbidden_ids)
        ids_B = draw(logps_BV, uniforms_B)
        return ids_B, logps_BV.gather(-1, ids_B[:, None]).squeeze(1)
    # Nothing is cut off: one exponential a token is enough, for drawing and for the normaliser.
    logits = _allowed(logits_BV, forbidden_ids) / law.temperature
    highest_B1 = logits.amax(-1, keepdim=True)
    weights_BV = (logits - highest_B1).exp_()
    ids_B, total_B = _invert(weights_BV, uniforms_B)
    chosen_B = (logits.gather(-1, ids_B[:, None]) - highest_B1).squeeze(1)
    return ids_B, chosen_B - total_B.log().to(chosen_B.dtype)


def _allowed(logits_BV: Tensor, forbidden_ids: Tensor | None) -> Tensor:
    logits = upcast(logits_BV)
    return logits if forbidden_ids is None else logits.index_fill(-1, forbidden_ids, -torch.inf)


def law_logps(logits_BV: Tensor, law: SamplingLaw, forbidden_ids: Tensor | None = None) -> Tensor:
    """Compute log-probabilities of the next token under the sampling law, with the arguments of `sample_tokens`.

    They are -inf at tokens that the law excludes. Temperature 0 is greedy: all mass on the largest logit.

    >>> logits = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> law_logps(logits, SamplingLaw(top_p=0.5)).exp()
    tensor([[0., 1., 0.]])
    """
    logits = _allowed(logits_BV, forbidden_ids)
    if law.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logps = torch.log_softmax(logits / law.temperature, dim=-1)
    if not law.truncates:
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
    """Draw one token a row, never one at -inf, by inverting the cumulative distribution at numbers in [0, 1).

    >>> draw(torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.tensor([0.6]).double())
    tensor([1])
    """
    return _invert(logps_BV.exp(), uniforms_B)[0]


def _invert(weights_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Find the token at which the running sum of the weights passes uniform x total, and the total [B] in float64.

    In two levels: first the block of tokens, then the token in it. Sums are running in float64, for over 150k tokens an
    fp32 running sum would lose the tail.
    """
    padded = torch.nn.functional.pad(weights_BV, (0, -weights_BV.shape[1] % _BLOCK))
    blocks_BKC = padded.view(len(weights_BV), -1, _BLOCK)
    upto_BK = blocks_BKC.sum(-1).double().cumsum(-1)
    total_B = upto_BK[:, -1]
    target_B1 = uniforms_B[:, None] * total_B[:, None]
    # Where a logit is not finite no sum is passed. Some token is named all the same: an index beyond the last would end
    # a CUDA process before anybody could tell what is wrong, as the NaN of its log-probability does.
    block_B1 = _first_above(upto_BK, target_B1).clamp(max=upto_BK.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, upto_BK.gather(-1, (block_B1 - 1).clamp(min=0)), 0.0)
    inner_BC = blocks_BKC.gather(1, block_B1[..., None].expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    ids_B1 = block_B1 * _BLOCK + _first_above(inner_BC, target_B1 - before_B1)
    return ids_B1.squeeze(1).clamp(max=weights_BV.shape[1] - 1), total_B


def _first_above(sums_BK: Tensor, target_B1: Tensor) -> Tensor:
    # Strictly below the last sum, or rounding could choose what lies behind the last possible one.
    last_B1 = sums_BK[:, -1:]
    return torch.searchsorted(
        sums_BK, torch.minimum(target_B1, torch.nextafter(last_B1, torch.zeros_like(last_B1))), right=True
    )
