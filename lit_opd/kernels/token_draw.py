"""Draw a token a row from untruncated logits in two readings, without a running sum over the vocabulary.

The first kernel sums the weights of each block of tokens, the second finds the block where the running sum of these
sums passes the uniform number, and the token in it. The plain function is `functional.sampling.sample_tokens`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["draw_tokens"]

_BLOCK = 2048


def draw_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, factor: float = 1.0, softcap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting its cumulative distribution, and say how probable it was.

    Args:
        logits_BV: unnormalised, in any dtype, read as fp32; -inf at tokens that may not be drawn.
        uniforms_B: float64 numbers in [0, 1).
        factor: on the logits, at the very end: 1 / temperature.
        softcap: logits become softcap x tanh(logits / softcap) before that; None for no change.
        scale: on the logits, at the very beginning.

    Returns:
        Token ids [B], int64, and their log-probabilities [B], nats in fp32.
    """
    rows, vocabulary = logits_BV.shape
    blocks = triton.cdiv(vocabulary, _BLOCK)
    peaks = logits_BV.new_empty(2, rows, blocks, dtype=torch.float32)
    ids = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    logps = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    shape = (vocabulary, logits_BV.stride(0), float(scale), float(factor), softcap or 1.0)
    _block_sums[(rows, blocks)](logits_BV, *peaks, *shape, CAPS=softcap is not None, BLOCK=_BLOCK)
    _invert[(rows,)](
        logits_BV, *peaks, uniforms_B, ids, logps, blocks, *shape, CAPS=softcap is not None, BLOCK=_BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return ids, logps


@triton.jit
def _read(logits, token, vocabulary, scale, factor, softcap, CAPS: tl.constexpr):
    found = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32) * scale
    if CAPS:
        # tanh(x) = 2 sigmoid(2 x) - 1, which stays finite for large x. A token at -inf may not be drawn, and stays so.
        capped = softcap * (2.0 / (1.0 + tl.exp(-2.0 * found / softcap)) - 1.0)
        found = tl.where(found == float("-inf"), found, capped)
    return found * factor


@triton.jit
def _block_sums(
    logits, peak, total, vocabulary, logits_row, scale, factor, softcap, CAPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    found = _read(logits + row * logits_row, token, vocabulary, scale, factor, softcap, CAPS)
    highest = tl.max(found, 0)
    # A block whose tokens may all not be drawn has weight 0, and not exp(-inf + inf).
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    slot = row * tl.num_programs(1) + block
    tl.store(peak + slot, highest)
    tl.store(total + slot, tl.sum(tl.exp(found - shift), 0))


@triton.jit
def _first_above(sums, target, place, last):
    """Find the first place whose running sum is above the target, or the last that adds to it where rounding is."""
    return tl.min(tl.where(sums > target, place, last), 0)


@triton.jit
def _invert(
    logits, peak, total, uniforms, ids, logps, blocks, vocabulary, logits_row, scale, factor, softcap,
    CAPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, number = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    exists = number < blocks
    peaks = tl.load(peak + row * blocks + number, mask=exists, other=float("-inf"))
    highest = tl.max(peaks, 0)
    sums = tl.load(total + row * blocks + number, mask=exists, other=0.0) * tl.exp(peaks - highest)
    # In float64, for an fp32 running sum would lose the tail, and an fp32 uniform its smallest steps.
    weights = sums.to(tl.float64)
    upto, mass = tl.cumsum(weights, 0), tl.sum(weights, 0)
    target = tl.load(uniforms + row) * mass
    chosen = _first_above(upto, target, number, tl.max(tl.where(weights > 0, number, 0), 0))
    before = tl.sum(tl.where(number < chosen, weights, 0.0), 0)
    place = tl.arange(0, BLOCK)
    found = _read(logits + row * logits_row, chosen * BLOCK + place, vocabulary, scale, factor, softcap, CAPS)
    inner = tl.exp(found - highest).to(tl.float64)
    last = tl.max(tl.where(inner > 0, place, 0), 0)
    own = _first_above(tl.cumsum(inner, 0), target - before, place, last)
    logit = tl.sum(tl.where(place == own, found, 0.0), 0)
    tl.store(ids + row, (chosen * BLOCK + own).to(tl.int64))
    tl.store(logps + row, (logit - highest).to(tl.float32) - tl.log(mass.to(tl.float32)))
