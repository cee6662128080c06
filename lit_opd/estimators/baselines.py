"""Estimators that change the variance of the score function and not its expectation.

Whatever does not depend on the sampled token, given its prefix, may be subtracted from its cost for free. That holds
where being counted does not depend on the token either: `estimator.masked_tokens` makes it depend, and lets a baseline
push the mass of the masked tokens.

>>> import torch
>>> p, q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
>>> tokens = TokenBatch(p, q, p, torch.tensor([True]), kl_BT=torch.tensor([0.25]))
>>> vopd(tokens).loss_BT / p  # log-ratio minus its mean
tensor([0.4431])
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator, register_mixture
from lit_opd.estimators.sampled import log_ratio, score_function
from lit_opd.estimators.sequence import counted
from lit_opd.estimators.topk import support_logps
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import SHARE, allow, whole
from lit_opd.functional.returns import leave_one_out_mean, return_to_go
from lit_opd.functional.support import support_divergence
from lit_opd.types import Estimate, TokenBatch

# In between the ends the target is neither KL, so that only they are declared unbiased.
_DISCOUNTED: dict[str, Any] = {
    "target": "sequence_reverse_kl",
    "unbiased": False,
    "check": allow(gamma=SHARE),
    "variants": (
        Variant({"gamma": 1.0}, "undiscounted, the whole sequence", unbiased=True),
        Variant({"gamma": 0.0}, "this position alone", target="reverse_kl", unbiased=True),
        Variant({"gamma": 0.5}, "between the two"),
    ),
}


def _exact_kl(tokens: TokenBatch) -> Tensor:
    assert tokens.kl_BT is not None
    return upcast(tokens.kl_BT)


def _future_kl(tokens: TokenBatch, gamma: float) -> Tensor:
    """Sum gamma^(i - t) KL_i over i > t, [B, T]: the expected cost of the tokens that follow, given the contexts."""
    kl_BT = counted(tokens, _exact_kl(tokens))
    return return_to_go(kl_BT, gamma) - kl_BT


def _centred(tokens: TokenBatch, returns_BT: Tensor) -> Tensor:
    """Subtract the mean over the other completions of the prompt, where a completion has the return 0 past its end."""
    assert tokens.groups_B is not None
    return returns_BT - leave_one_out_mean(returns_BT, tokens.groups_B)


@register_estimator(
    "vopd",
    target="reverse_kl",
    unbiased=True,
    needs="token+kl",
    source="vOPD, arXiv:2605.07865",
)
def vopd(tokens: TokenBatch) -> Estimate:
    """Subtract the exact KL from the log-ratio, often for less variance but at the price of the whole distribution.

    Formula, with d_t and KL_t detached: loss_t = (d_t - KL_t) log p(y_t). The cost has mean zero at every prefix.
    That is not the baseline of least variance: where the models differ on what the student is sure of, the KL is large
    and the rare tokens pay for it. `full_vocab` has the same expectation, needs, and no action noise at all.
    """
    kl = _exact_kl(tokens)
    return score_function(tokens, log_ratio(tokens) - kl, kl)


@register_estimator(
    "vopd_topk",
    target="reverse_kl",
    unbiased=True,
    needs="support",
    source="vOPD, arXiv:2605.07865",
    check=allow(k=whole()),
    on_policy=True,
)
def vopd_topk(tokens: TokenBatch, *, k: int = 16) -> Estimate:
    """Subtract the KL on the teacher's top K from the log-ratio, which nears `vopd` as K grows.

    Formula, with d_t and the baseline detached: loss_t = (d_t - sum over S of p d) log p(y_t). The sum over the support
    S does not depend on y_t. It nears the KL as the student's mass on S nears 1; over few tokens, which the teacher
    likes and which so have a negative d, it has the wrong sign and adds variance.

    Args:
        tokens: sampled and support log-probabilities, the latter under the full softmax, [..., K], nats.
        k: size of the support.
    """
    baseline = support_divergence(*support_logps(tokens), divergence="reverse_kl", mass="truncate")
    return score_function(tokens, log_ratio(tokens) - baseline)


@register_estimator(
    "leave_one_out",
    family="sequence",
    needs="token+groups",
    source="leave-one-out baseline on the return of arXiv:2603.25562",
    **_DISCOUNTED,
)
def leave_one_out(tokens: TokenBatch, *, gamma: float = 1.0) -> Estimate:
    """Subtract the return of the prompt's other completions, which takes out their level and adds their noise.

    Formula, with R_t = sum over i >= t of gamma^(i - t) d_i detached: loss_t = (R_t - mean of R_t over the other
    completions) log p(y_t). The level is most of the return in long completions; the noise is the smaller the more
    completions there are: two of them can double the variance. The gradient aimed at is that of `hybrid` with this
    gamma, which between 0, the local reverse KL, and 1, that of sequences, is neither, and counted as a biased one of
    the latter. A completion without company keeps its return as it is.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, the mask, and which rows share a prompt.
        gamma: discount, 0 to 1.
    """
    returns_BT = return_to_go(counted(tokens, log_ratio(tokens)), gamma)
    return score_function(tokens, _centred(tokens, returns_BT))


@register_estimator(
    "rao_blackwell_return",
    family="sequence",
    needs="token+kl",
    source="Rao-Blackwell of the return of arXiv:2603.25562; baseline of vOPD, arXiv:2605.07865",
    **_DISCOUNTED,
)
def rao_blackwell_return(tokens: TokenBatch, *, gamma: float = 1.0) -> Estimate:
    """Put exact KLs for later sampled log-ratios, most often with less variance, for the teacher's distribution.

    Formula, all of it detached: loss_t = (d_t - KL_t + sum over i > t of gamma^(i - t) KL_i) log p(y_t). KL_i is the
    expectation of d_i over y_i, and KL_t the baseline of `vopd`; what stays is the noise of the contexts.

    Args:
        tokens: sampled log-probabilities and the exact reverse KL, [B, T], nats, and the mask.
        gamma: discount, 0 to 1; between the ends the target is that of `hybrid`.
    """
    kl_BT = _exact_kl(tokens)
    return score_function(tokens, log_ratio(tokens) - kl_BT + _future_kl(tokens, gamma), kl_BT)


@register_estimator(
    "centred_rao_blackwell_return",
    family="sequence",
    needs="token+kl+groups",
    source="as `rao_blackwell_return`, with a leave-one-out baseline on what is to come",
    **_DISCOUNTED,
)
def centred_rao_blackwell_return(tokens: TokenBatch, *, gamma: float = 1.0) -> Estimate:
    """Score each token by the exact KLs to come minus those of the prompt's other completions, which lack their level.

    Formula, all of it detached, with F_t = sum over i > t of gamma^(i - t) KL_i: loss_t = (d_t - KL_t + F_t - mean of
    F_t over the other completions) log p(y_t). The own completion is left out of the mean, which keeps it unbiased;
    completions that have ended count 0 in it. Where a prompt has one completion it is `rao_blackwell_return`.

    Args:
        tokens: as of `rao_blackwell_return`, and which rows share a prompt.
        gamma: discount, 0 to 1; between the ends the target is that of `hybrid`.
    """
    kl_BT = _exact_kl(tokens)
    return score_function(tokens, log_ratio(tokens) - kl_BT + _centred(tokens, _future_kl(tokens, gamma)), kl_BT)


@register_estimator(
    "future_kl_return",
    family="sequence",
    needs="token+kl+groups",
    source="the part of `centred_rao_blackwell_return` that the local reverse KL lacks",
    check=allow(gamma=SHARE),
)
def future_kl_return(tokens: TokenBatch, *, gamma: float = 1.0) -> Estimate:
    """Score each token by the exact KLs to come alone, centred, which is what a local reverse KL lacks.

    Formula, all of it detached: loss_t = (F_t - mean of F_t over the prompt's other completions) log p(y_t), with F_t
    as in `centred_rao_blackwell_return`. It leads to prefixes from which the models agree; at gamma 0 it is nothing.

    Args:
        tokens: student log-probabilities, the exact reverse KL, [B, T], nats, the mask, and which rows share a prompt.
        gamma: discount, 0 to 1.
    """
    return score_function(tokens, _centred(tokens, _future_kl(tokens, gamma)), _exact_kl(tokens))


@register_mixture(
    "exact_local_return",
    source="full reverse KL, arXiv:2306.13649, plus `future_kl_return`",
    on_policy=True,
    **_DISCOUNTED,
)
def exact_local_return(*, gamma: float = 1.0) -> dict[str, Any]:
    """Add the exact KLs to come, centred, to the full KL of every position, so that the local part has no action noise.

    Formula: the sum of `full_vocab` and `future_kl_return`, loss_t = KL_t + (F_t - mean of F_t over the others) log
    p(y_t). The local part has no action noise; the whole has often less variance than `token`, whose target is local.

    Args:
        gamma: discount of the KLs to come, 0 to 1; 0 is `full_vocab`, between the ends the target is that of `hybrid`.
    """
    return {"full_vocab": 1.0, "future_kl_return": {"weight": 1.0, "gamma": gamma}}
