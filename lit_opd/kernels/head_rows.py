"""Read rows of student and teacher logits once, and write a gradient in the place of the student's.

`functional.fused_head` calls these kernels and holds what they compute to names. Their plain twins are `log_softmax`,
`functional.divergences` and autograd. Logits may be in any float of at most 32 bits; all that is computed is in fp32.
They are raw projections: scale, soft cap and temperature of a head are applied while they are read.

This file imports triton: import it where a kernel is about to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["DIVERGENCES", "Pair", "Shape", "read_rows", "sum_divergence", "write_gradient"]

# The first three follow from one reading, the others from a second one.
DIVERGENCES = ("reverse_kl", "forward_kl", "mixed_kl", "jsd", "tvd", "skew_reverse_kl", "skew_forward_kl")
# Tokens of a row that a program holds at once, 16 a thread; a power of two.
_BLOCK, _WARPS = 4096, 8


class Shape(NamedTuple):
    """The way from a projection to logits, as in `functional.head.Head`.

    Attributes:
        scale: factor on the projection.
        softcap: 0 for none.
        cool: factor at the very end, the inverse of the temperature.
    """

    scale: float = 1.0
    softcap: float = 0.0
    cool: float = 1.0


class Pair(NamedTuple):
    """Rows of the student's projection and the teacher's, None where there is none, and the shapes of both."""

    student_cV: Tensor
    student: Shape
    teacher_cV: Tensor | None
    teacher: Shape


def read_rows(pair: Pair, entropies: bool = False) -> Tensor:
    """Read every row once, by a softmax whose maximum grows on the way.

    Returns:
        [6, c] fp32: log-normaliser of student and of teacher, reverse and forward KL, entropy of student and of teacher
        (nats). Without a teacher its rows and the KLs, and without `entropies` these, mean nothing.
    """
    rows = len(pair.student_cV)
    found_6c = torch.zeros(6, rows, dtype=torch.float32, device=pair.student_cV.device)
    _launch(_read, rows, pair, found_6c, ENTROPIES=entropies)
    return found_6c


def sum_divergence(pair: Pair, normalisers_2c: Tensor, name: str, weight: float) -> Tensor:
    """Sum a divergence of every row that needs both normalisers first.

    `weight` is the `teacher_weight` or the `skew` of `functional.divergences`.

    Returns:
        [2, c] fp32: the divergence, and the mean over the student's tokens of its derivative by their probability.
    """
    found_2c = torch.zeros_like(normalisers_2c)
    _launch(_sum, len(pair.student_cV), pair, normalisers_2c, found_2c, weight, DIVERGENCE=name)
    return found_2c


def write_gradient(
    pair: Pair,
    normalisers_2c: Tensor,
    chosen: tuple[Tensor, Tensor],
    divergence: tuple[str, float, Tensor, Tensor] | None,
) -> None:
    """Write the gradient by the student's projection into its place.

    Args:
        pair: the rows, of which the student's are overwritten.
        normalisers_2c: log-normalisers of both.
        chosen: ids [c, K] of tokens, and the derivative [c, K] of the loss by their log-probabilities. An id may stand
            in a row several times.
        divergence: one of `DIVERGENCES`, its weight (of a mixed KL that of the forward KL), the mean of
            `sum_divergence` (for the first three the reverse KL) and the derivative of the loss by it, [c] both.
    """
    ids_cK, by_logps_cK = chosen
    name, weight, *by_row = divergence or ("", 0.0)
    mean_c, by_divergence_c = by_row or (normalisers_2c[0], normalisers_2c[0])
    rows, vocabulary = pair.student_cV.shape
    blocks = triton.cdiv(vocabulary, _BLOCK)
    pair = pair if divergence is not None else pair._replace(teacher_cV=None)
    chosen_each = (ids_cK.contiguous(), by_logps_cK.contiguous(), by_logps_cK.sum(1), ids_cK.shape[1])
    # The derivative of a plain sum is one number, expanded.
    by_each = (mean_c.contiguous(), by_divergence_c.contiguous())
    _launch(_write, rows * blocks, pair, normalisers_2c, *chosen_each, *by_each, weight, blocks, DIVERGENCE=name)


def _launch(kernel: Any, programs: int, pair: Pair, *rest: Any, **constants: Any) -> None:
    if not programs:
        return
    student_cV, student, teacher_cV, teacher = pair
    other_cV = student_cV if teacher_cV is None else teacher_cV
    assert student_cV.shape == other_cV.shape
    assert student_cV.stride(1) == other_cV.stride(1) == 1
    numbers = (*student_cV.shape, student_cV.stride(0), other_cV.stride(0), *student, *teacher, *rest)
    with torch.cuda.device_of(student_cV):  # triton launches on the current device, whatever it is given
        kernel[(programs,)](
            student_cV, other_cV, *numbers, STUDENT_CAPPED=bool(student.softcap), TEACHER_CAPPED=bool(teacher.softcap),
            TEACHER=teacher_cV is not None, BLOCK=_BLOCK, num_warps=_WARPS, **constants,
        )  # fmt: skip


@triton.jit
def _logits(row, at, inside, scale, softcap, cool, CAPPED: tl.constexpr):
    """Load tokens of a row and apply the head's shape, -inf past the vocabulary."""
    logits = tl.load(row + at, mask=inside, other=0.0).to(tl.float32) * scale
    if CAPPED:
        # tanh, written so that no exponential overflows.
        fall = tl.exp(-2.0 * tl.abs(logits) / softcap)
        logits = tl.where(logits < 0, -softcap, softcap) * ((1.0 - fall) / (1.0 + fall))
    return tl.where(inside, logits * cool, -float("inf"))


@triton.jit
def _times(total, shrink):
    """Shrink a running sum to a larger maximum, to nothing where that is infinitely larger."""
    return tl.where(shrink > 0, total * shrink, 0.0)


@triton.jit
def _compare(s, t, weight, DIVERGENCE: tl.constexpr):
    """Compute what each token adds to a divergence, and its derivative by the student's probability times that."""
    p, q = tl.exp(s), tl.exp(t)
    if DIVERGENCE == "tvd":
        gap = p - q
        added = 0.5 * tl.abs(gap)
        slope = tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0)) * p
    else:
        own = weight if DIVERGENCE == "skew_reverse_kl" else 1.0 - weight
        mixture = own * p + (1.0 - own) * q
        from_p = tl.where(p > 0, p * (s - tl.log(mixture)), 0.0)
        from_q = tl.where(q > 0, q * (t - tl.log(mixture)), 0.0)
        if DIVERGENCE == "jsd":
            added = from_p / weight + from_q / (1.0 - weight)
            slope = from_p / weight
        elif DIVERGENCE == "skew_reverse_kl":
            added = from_p
            slope = from_p - tl.where(p > 0, own * p * (p / mixture), 0.0)
        else:
            added = from_q
            slope = tl.where(p > 0, -own * p * (q / mixture), 0.0)
    return added, slope


# What differs from chunk to chunk is not specialised on, or another last chunk would be compiled for in mid-run.
@triton.jit(do_not_specialize=["rows", "found"])
def _read(
    student, teacher, rows, vocabulary, student_stride, teacher_stride,
    scale, softcap, cool, teacher_scale, teacher_softcap, teacher_cool, found,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER: tl.constexpr, ENTROPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)  # of the row: rows x vocabulary may not fit into 32 bits
    student += number * student_stride
    teacher += number * teacher_stride
    # Finite, or a first block without any possible token would subtract infinity from itself.
    top_s, top_t = -3.0e38, -3.0e38
    sum_s, sum_t, gap_s, gap_t, mean_s, mean_t = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        s = _logits(student, at, inside, scale, softcap, cool, STUDENT_CAPPED)
        higher = tl.maximum(top_s, tl.max(s, 0))
        shrink = tl.exp(top_s - higher)
        share_s = tl.exp(s - higher)
        top_s = higher
        sum_s = sum_s * shrink + tl.sum(share_s, 0)
        if ENTROPIES:
            mean_s = _times(mean_s, shrink) + tl.sum(tl.where(share_s > 0, share_s * s, 0.0), 0)
        if TEACHER:
            t = _logits(teacher, at, inside, teacher_scale, teacher_softcap, teacher_cool, TEACHER_CAPPED)
            gap_s = _times(gap_s, shrink) + tl.sum(tl.where(share_s > 0, share_s * (s - t), 0.0), 0)
            higher = tl.maximum(top_t, tl.max(t, 0))
            shrink = tl.exp(top_t - higher)
            share_t = tl.exp(t - higher)
            top_t = higher
            sum_t = sum_t * shrink + tl.sum(share_t, 0)
            gap_t = _times(gap_t, shrink) + tl.sum(tl.where(share_t > 0, share_t * (t - s), 0.0), 0)
            if ENTROPIES:
                mean_t = _times(mean_t, shrink) + tl.sum(tl.where(share_t > 0, share_t * t, 0.0), 0)
    found += number
    normaliser_s = top_s + tl.log(sum_s)
    tl.store(found, normaliser_s)
    if ENTROPIES:
        tl.store(found + 4 * rows, normaliser_s - mean_s / sum_s)
    if TEACHER:
        normaliser_t = top_t + tl.log(sum_t)
        tl.store(found + rows, normaliser_t)
        tl.store(found + 2 * rows, gap_s / sum_s - (normaliser_s - normaliser_t))
        tl.store(found + 3 * rows, gap_t / sum_t - (normaliser_t - normaliser_s))
        if ENTROPIES:
            tl.store(found + 5 * rows, normaliser_t - mean_t / sum_t)


@triton.jit(do_not_specialize=["rows", "normalisers", "found"])
def _sum(
    student, teacher, rows, vocabulary, student_stride, teacher_stride,
    scale, softcap, cool, teacher_scale, teacher_softcap, teacher_cool,
    normalisers, found, weight,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    student += number * student_stride
    teacher += number * teacher_stride
    normaliser_s, normaliser_t = tl.load(normalisers + number), tl.load(normalisers + rows + number)
    value, mean = 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        s = _logits(student, at, inside, scale, softcap, cool, STUDENT_CAPPED)
        t = _logits(teacher, at, inside, teacher_scale, teacher_softcap, teacher_cool, TEACHER_CAPPED)
        added, slope = _compare(s - normaliser_s, t - normaliser_t, weight, DIVERGENCE)
        value += tl.sum(added, 0)
        mean += tl.sum(slope, 0)
    tl.store(found + number, value)
    tl.store(found + rows + number, mean)


@triton.jit(do_not_specialize=["rows", "normalisers", "ids", "by_logps", "by_all", "k", "mean", "by_divergence"])
def _write(
    student, teacher, rows, vocabulary, student_stride, teacher_stride,
    scale, softcap, cool, teacher_scale, teacher_softcap, teacher_cool,
    normalisers, ids, by_logps, by_all, k, mean, by_divergence, weight, blocks,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < vocabulary
    student += number * student_stride
    logits = _logits(student, at, inside, scale, softcap, cool, STUDENT_CAPPED)
    s = logits - tl.load(normalisers + number)
    p = tl.exp(s)
    slope = -tl.load(by_all + number) * p
    if TEACHER:
        t = _logits(teacher + number * teacher_stride, at, inside, teacher_scale, teacher_softcap, teacher_cool,
                    TEACHER_CAPPED) - tl.load(normalisers + rows + number)  # fmt: skip
        centre = tl.load(mean + number)
        if DIVERGENCE == "reverse_kl":
            by_logit = tl.where(p > 0, p * (s - t - centre), 0.0)
        elif DIVERGENCE == "forward_kl":
            by_logit = p - tl.exp(t)
        elif DIVERGENCE == "mixed_kl":
            reverse = tl.where(p > 0, p * (s - t - centre), 0.0)
            by_logit = weight * (p - tl.exp(t)) + (1.0 - weight) * reverse
        else:
            _, by_probability = _compare(s, t, weight, DIVERGENCE)
            by_logit = by_probability - p * centre
        slope += tl.load(by_divergence + number) * by_logit
    for i in range(0, k):
        token = tl.load(ids + number * k + i)
        if (token >= start) & (token < start + BLOCK):
            slope += tl.where(at == token, tl.load(by_logps + number * k + i), 0.0)
    if STUDENT_CAPPED:
        capped = logits / (cool * softcap)
        slope *= 1.0 - capped * capped
    slope *= scale * cool
    tl.store(student + at, slope.to(student.dtype.element_ty), mask=inside)
