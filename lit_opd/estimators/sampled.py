"""Estimators that need one teacher log-probability a token, each position for itself.

A value of the KL at the sampled token (k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, with d the log-ratio) becomes a
gradient in one of two ways: differentiated as a loss, or detached as the cost that weighs the score function. They
differ: k1 gives the reverse KL's gradient as a cost and none at all as a loss; k2 and k3 as losses give the reverse and
the *forward* KL's.

>>> p, q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log()
>>> tokens = TokenBatch(p, q, p, mask_BT=torch.ones_like(p).bool())
>>> log_ratio(tokens)
tensor([0.6931, 0.0000])
>>> k2_loss(tokens).loss_BT, k3_loss(tokens).loss_BT
(tensor([0.2402, 0.0000]), tensor([0.1931, 0.0000]))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import Range, allow, one_of
from lit_opd.types import Estimate, TokenBatch

_WHERE = ("doubted", "all")


def log_ratio(tokens: TokenBatch) -> Tensor:
    """Compute log p - log q of the sampled tokens, with the student's gradient, in fp32 (float64 stays)."""
    return upcast(tokens.student_logps_BT) - upcast(tokens.teacher_logps_BT)


def score_function(
    tokens: TokenBatch, cost: Tensor, kl: Tensor | None = None, clipped: Tensor | None = None
) -> Estimate:
    """Weigh the score function by a cost, so that the gradient is cost x grad log p(y_t).

    Args:
        tokens: student and teacher log-probabilities, [B, T] or [N], nats.
        cost: of each token, the larger the worse: minus its advantage, the same shape. No gradient flows through
            it, and values at masked positions are ignored.
        kl: what to log as the KL; None for the log-ratio.
        clipped: where a limit changed the cost; None where it has none.
    """
    counted_cost = cost.detach().masked_fill(~tokens.mask_BT, 0.0)
    value = log_ratio(tokens) if kl is None else kl
    return Estimate(loss_BT=counted_cost * upcast(tokens.student_logps_BT), kl_BT=value.detach(), clipped_BT=clipped)


def k3(log_ratio: Tensor) -> Tensor:
    """Compute exp(-d) - 1 + d, an estimate of the reverse KL that is never negative, infinite in fp32 below d = -88."""
    return torch.expm1(-log_ratio) + log_ratio


@register_estimator(
    "token",
    target="reverse_kl",
    unbiased=True,
    source="Thinking Machines Lab, On-Policy Distillation (2025); arXiv:2603.25562, gamma = 0",
)
def sampled_reverse_kl(tokens: TokenBatch) -> Estimate:
    """Weigh the score function by this token's log-ratio, which needs one teacher number a token and has its noise.

    Formula, with d_t = log p(y_t) - log q(y_t) detached: loss_t = d_t log p(y_t). Over y_t ~ p its expected gradient is
    that of KL(student || teacher) at the position, with the prefix held fixed. Trades variance for needing only one
    number a token from the teacher.
    """
    return score_function(tokens, log_ratio(tokens))


@register_estimator(
    "k2_loss",
    target="reverse_kl",
    unbiased=True,
    source="k2 of Schulman's note on approximating KL; arXiv:2603.25562, whose code has it as mse",
)
def k2_loss(tokens: TokenBatch) -> Estimate:
    """Differentiate half the squared log-ratio, which has the gradient of `token` and a value that can be read.

    Formula: loss_t = d_t^2 / 2 with d_t = log p(y_t) - log q(y_t), differentiated: d_t grad log p(y_t).

    Returns:
        Loss, the k2 estimate of the KL, and the same detached.
    """
    loss = log_ratio(tokens).square() / 2
    return Estimate(loss_BT=loss, kl_BT=loss.detach())


@register_estimator(
    "k3_loss",
    target="forward_kl",
    unbiased=True,
    source="k3 of Schulman's note on approximating KL; arXiv:2603.25562, whose code has it as low_var_kl",
)
def k3_loss(tokens: TokenBatch) -> Estimate:
    """Differentiate the k3 value, which follows the *forward* KL though elsewhere it goes by the name of the reverse.

    Formula: loss_t = exp(-d_t) - 1 + d_t with d_t = log p(y_t) - log q(y_t), differentiated: (1 - q/p) grad log p(y_t).
    As a value it is an unbiased estimate of KL(student || teacher), never negative; its expected gradient is that of
    KL(teacher || student). The factor q/p is unbounded, so rare tokens that the teacher likes dominate the noise.

    Returns:
        Loss, the k3 estimate of the reverse KL, and the same detached.
    """
    loss = k3(log_ratio(tokens))
    return Estimate(loss_BT=loss, kl_BT=loss.detach())


_LIMIT = Range("be positive and finite", lambda value: 0 < value < math.inf, "without a limit it is `token`")


@register_estimator(
    "clipped_log_ratio",
    target="reverse_kl",
    source="arXiv:2603.25562 (clip_log_ratio)",
    check=allow(max_log_ratio=_LIMIT),
    small={"max_log_ratio": 0.5},
)
def clipped_log_ratio(tokens: TokenBatch, *, max_log_ratio: float = 5.0) -> Estimate:
    """Bound the log-ratio that weighs the score function, which loses the tail of the cost for less variance.

    Formula, with d_t detached: loss_t = clamp(d_t, -c, c) log p(y_t). Biased as soon as a log-ratio exceeds c.

    Args:
        tokens: student, teacher log-probabilities of the sampled tokens, [B, T] or [N], nats.
        max_log_ratio: c, nats; the default is that of the code of arXiv:2603.25562, 20 is usual elsewhere.
    """
    d = log_ratio(tokens)
    clipped = d.abs() > max_log_ratio
    return score_function(tokens, d.clamp(-max_log_ratio, max_log_ratio), clipped=clipped)


@register_estimator(
    "log_ratio_sign",
    target="reverse_kl",
    source="as described of BinaryOPD, arXiv:2609.33791",
)
def log_ratio_sign(tokens: TokenBatch) -> Estimate:
    """Keep of the log-ratio nothing but its sign, a baseline that follows twice the total variation distance.

    Formula, with d_t detached: loss_t = sign(d_t) log p(y_t). Over y_t ~ p its expected gradient is exactly twice that
    of `tvd`: biased for the reverse KL, bounded whatever the teacher says, and as loud beside the teacher as far from
    it. Where both models say the same there is none; where they differ by rounding alone, it is noise of full size.

    Args:
        tokens: student, teacher log-probabilities of the sampled tokens, [B, T] or [N], nats.

    Returns:
        Surrogate loss and the log-ratio, not its sign, same shape.
    """
    return score_function(tokens, log_ratio(tokens).sign())


_NEGATIVE = Range("be negative and finite", lambda value: -math.inf < value < 0)


@register_estimator(
    "fixed_advantage",
    target="reverse_kl",
    source="as described in arXiv:2608.31046 (one fixed negative advantage)",
    check=allow(advantage=_NEGATIVE, where=one_of(_WHERE)),
    variants=(
        Variant({"where": "all"}, "the teacher is not looked at: nothing in expectation", at_equal="expectation"),
        Variant({"advantage": -0.25}, "another size"),
    ),
)
def fixed_advantage(tokens: TokenBatch, *, advantage: float = -1.0, where: str = "doubted") -> Estimate:
    """Push down the tokens that the teacher finds less probable, all alike, a baseline that follows total variation.

    Formula, with A = `advantage`: loss_t = -A log p(y_t) where log p(y_t) > log q(y_t), and 0 elsewhere (`doubted`), or
    everywhere (`all`). Over y_t ~ p the expected gradient of `doubted` is exactly -A times that of `tvd`; it is
    `log_ratio_sign` with a baseline, at half its size. That of `all`, which needs no teacher, is zero: what it trains
    with is noise, and the linter refuses it unless `lint.allow` names the rule.

    Args:
        tokens: student, teacher log-probabilities of the sampled tokens, [B, T] or [N], nats.
        advantage: A, below 0.
        where: `doubted` or `all`.

    Returns:
        Surrogate loss and the log-ratio, same shape.
    """
    d = log_ratio(tokens)
    pushed = d > 0 if where == "doubted" else torch.ones_like(tokens.mask_BT)
    return score_function(tokens, -advantage * pushed.to(d.dtype))
