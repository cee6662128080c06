"""Weightings by position, by entropy and by prompt, of the tokens of another estimator.

A weighting re-weights the loss of its `base` token by token; what it drops still counts where the loss is divided by
the number of tokens. Weights come from counted tokens alone and are zero elsewhere. With a base that is zero for every
sample at student == teacher, the optimum stays; what changes is where a student that cannot reach it spends its effort.

>>> p = torch.tensor([[0.5, 0.5, 0.5]]).log()
>>> tokens = TokenBatch(p, p, p, torch.ones_like(p).bool())
>>> prefix_opd(tokens, horizon=2), position_decay(tokens, half_life=1.0)
(tensor([[1., 1., 0.]]), tensor([[1.0000, 0.5000, 0.2500]]))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.outcomes import group_mean
from lit_opd.estimators.registry import register_weighting
from lit_opd.estimators.sampled import log_ratio
from lit_opd.estimators.sequence import counted
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import FINITE, POSITIVE, WEIGHT, Range, allow, whole
from lit_opd.types import TokenBatch

__all__ = ["entropy_weighted", "iw_opd", "paced", "position_decay", "prefix_opd", "weights_where"]


def weights_where(tokens: TokenBatch, kept_BT: Tensor) -> Tensor:
    """Turn a mask into weights 1 and 0 in the dtype of the maths, fp32 or float64 where the student's values are."""
    return kept_BT.to(upcast(tokens.student_logps_BT).dtype)


def _check_horizon(horizon: int, grow_to: int | None, **_: object) -> None:
    whole().check("horizon", horizon)
    if grow_to is not None:
        whole().check("grow_to", grow_to)
        Range(f"be at least horizon ({horizon})", lambda value: value >= horizon).check("grow_to", grow_to)


@register_weighting(
    "prefix_opd",
    target="reverse_kl",
    source="Prefix-OPD, arXiv:2602.15260; TOPD and POPD (growing), arXiv:2605.31490",
    check=_check_horizon,
    variants=(
        Variant({"horizon": 1_000_000, "base": "token"}, "longer than the completions", unbiased=True),
        Variant({"horizon": 1, "grow_to": 3}, "a prefix that grows with training"),
    ),
    small={"horizon": 1},
)
def prefix_opd(tokens: TokenBatch, *, horizon: int = 100, grow_to: int | None = None) -> Tensor:
    """Count only the first tokens of every completion, and drop late ones where a teacher is asked far off its path.

    Formula: w_t = 1 at the first h counted tokens, else 0. h is `horizon`, or grows from it to `grow_to` in proportion
    to the share of training that is done. Completions are still sampled whole: to save their cost as the papers do, set
    `rollout.max_new_tokens`.

    Args:
        tokens: the mask and the progress of training.
        horizon: h, or where it starts from; the default is about where arXiv:2605.27028 stops.
        grow_to: where h ends; None for a fixed one.
    """
    reach = horizon if grow_to is None else horizon + int(tokens.progress * (grow_to - horizon))
    return weights_where(tokens, tokens.mask_BT & (tokens.mask_BT.cumsum(1) <= reach))


@register_weighting(
    "position_decay",
    target="reverse_kl",
    source="a smooth form of the prefix of arXiv:2602.15260; early tokens carry most signal, arXiv:2606.22600",
    check=allow(half_life=POSITIVE),
    variants=(Variant({"half_life": math.inf, "base": "token"}, "nothing decays", unbiased=True),),
)
def position_decay(tokens: TokenBatch, *, half_life: float = 256.0) -> Tensor:
    """Weigh tokens exponentially less along the completion, as a prefix without an edge.

    Formula: w_t = 2^(-n_t / half_life), with n_t the number of counted tokens before t; the first weighs 1.

    Args:
        tokens: the mask.
        half_life: counted tokens over which the weight halves.
    """
    counted_BT = weights_where(tokens, tokens.mask_BT)
    before_BT = counted_BT.cumsum(1) - counted_BT
    return counted_BT * torch.exp2(-before_BT / half_life)


@register_weighting(
    "iw_opd",
    target="reverse_kl",
    source="IW-OPD, arXiv:2606.22600; not normalised, as in TRL",
    check=allow(gamma=WEIGHT),
    variants=(Variant({"gamma": 0.0, "base": "token"}, "every weight is one", unbiased=True),),
)
def iw_opd(tokens: TokenBatch, *, gamma: float = 0.5) -> Tensor:
    """Weigh early tokens more the sooner the student strays, as the completion's log-ratios add up.

    Formula, with |A_t| = |log p(y_t) - log q(y_t)|: w_t = 1 + gamma (1 - c_t), where c_t is the share of the sum of all
    |A| that stands before t. From 1 + gamma at the first token down towards 1; the mean is above 1.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.
        gamma: how much more the first token weighs.
    """
    size_BT = counted(tokens, log_ratio(tokens)).abs()
    total_B1 = size_BT.sum(1, keepdim=True)
    before_BT = (size_BT.cumsum(1) - size_BT) / torch.where(total_B1 > 0, total_B1, 1.0)
    return torch.where(tokens.mask_BT, 1 + gamma * (1 - before_BT), 0.0)


@register_weighting(
    "entropy_weighted",
    target="reverse_kl",
    needs="token+entropy",
    source="student entropy as a token's importance, arXiv:2604.14084; weighted rather than selected",
)
def entropy_weighted(tokens: TokenBatch) -> Tensor:
    """Weigh tokens in proportion to the student's entropy, so that effort goes where the student is undecided.

    Formula: w_t = H_t over its mean over the completion's counted tokens, so that the mean weight is 1. Where the
    student is certain of every token, all weigh 1.
    """
    assert tokens.student_entropy_BT is not None
    counted_BT = weights_where(tokens, tokens.mask_BT)
    entropy_BT = counted(tokens, upcast(tokens.student_entropy_BT)).clamp(min=0)
    mean_B1 = entropy_BT.sum(1, keepdim=True) / counted_BT.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mean_B1 > 0, entropy_BT / torch.where(mean_B1 > 0, mean_B1, 1.0), counted_BT)


@register_weighting(
    "paced",
    target="reverse_kl",
    needs="token+rewards+groups",
    source="PACED, arXiv:2603.11178",
    check=allow(pass_reward=FINITE),
)
def paced(tokens: TokenBatch, *, pass_reward: float = 1.0) -> Tensor:
    """Weigh prompts by how open they are, most where half of the completions pass and nothing where all or none do.

    Formula: w = 4 r (1 - r), at all tokens of a prompt's completions, with r the share of them that pass; the factor 4
    makes the largest weight 1. With n completions r is known to 1 / n, so that a prompt with a single one weighs 0, and
    the weight depends on the very completions it weighs.

    Args:
        tokens: rewards and prompts of the rows, [B], and the mask.
        pass_reward: the smallest reward of a completion that passes.
    """
    assert tokens.rewards_B is not None
    assert tokens.groups_B is not None
    counted_BT = weights_where(tokens, tokens.mask_BT)
    rate_B = group_mean((tokens.rewards_B >= pass_reward).to(counted_BT.dtype), tokens.groups_B)
    return counted_BT * (4 * rate_B * (1 - rate_B))[:, None]
