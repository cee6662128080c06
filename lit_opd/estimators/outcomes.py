"""Estimators that put an outcome reward beside the teacher, which a verifier gives to whole completions.

The advantage of a completion is its reward minus the mean of the *other* completions of its prompt: centred, and still
unbiased, for the baseline does not depend on the completion. Both parts are sums over the tokens of a completion, so
that their weights compare a reward with nats a completion.

>>> rewards_B, groups_B = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 7, 7])  # one prompt
>>> leave_one_out_advantage(rewards_B, groups_B)
tensor([ 1.0000, -0.5000, -0.5000])
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import k3, log_ratio, score_function
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import allow, at_least, one_of
from lit_opd.functional.ratios import banded_ratio, importance_ratio
from lit_opd.functional.returns import leave_one_out_mean
from lit_opd.types import Estimate, TokenBatch

__all__ = ["group_mean", "kdrl", "leave_one_out_advantage", "mopd", "outcome", "outcome_advantage", "outcome_mix"]

NEEDS = "token+rewards+groups"
KL_AS = ("reward", "k2", "k3")
_SMALLEST_DEVIATION = 1e-6  # below it rewards are equal up to rounding, which division would blow up


def group_mean(values_B: Tensor, groups_B: Tensor) -> Tensor:
    """Average over all rows of each row's group, which has one number in `groups_B`.

    >>> group_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 9]))
    tensor([2., 2., 5.])
    """
    _, group_B, sizes_G = groups_B.unique(return_inverse=True, return_counts=True)
    sums_G = values_B.new_zeros(len(sizes_G)).index_add(0, group_B, values_B)
    return (sums_G / sizes_G)[group_B]


def leave_one_out_advantage(rewards_B: Tensor, groups_B: Tensor, normalise: bool = False) -> Tensor:
    """Subtract the mean reward of the prompt's other completions from each reward.

    Args:
        rewards_B: [B].
        groups_B: [B] integers, equal for the completions of one prompt.
        normalise: divide by the standard deviation within the prompt, as GRPO does. This weighs prompts by how equal
            their rewards are, and is biased.

    Returns:
        [B], in the units of the rewards (without unit where normalised), fp32 (float64 stays). A completion alone with
        its prompt keeps its reward.
    """
    rewards_B = upcast(rewards_B)
    advantage_B = rewards_B - leave_one_out_mean(rewards_B, groups_B)
    if not normalise:
        return advantage_B
    # (r - mean of the others) (r - mean of all), averaged, is the variance with n - 1 in its denominator.
    variance_B = group_mean(advantage_B * (rewards_B - group_mean(rewards_B, groups_B)), groups_B)
    deviation_B = variance_B.clamp(min=0).sqrt()
    return advantage_B / torch.where(deviation_B > _SMALLEST_DEVIATION, deviation_B, 1.0)


def outcome_advantage(tokens: TokenBatch, normalise: bool) -> Tensor:
    """Compute `leave_one_out_advantage` of the rows of a batch, [B, 1]."""
    assert tokens.rewards_B is not None
    assert tokens.groups_B is not None
    return leave_one_out_advantage(tokens.rewards_B, tokens.groups_B, normalise)[:, None]


def _check_weights(kl_weight: float, outcome_weight: float, **_: object) -> None:
    if not (kl_weight >= 0 and outcome_weight >= 0 and kl_weight + outcome_weight > 0):
        found = f"found {kl_weight} and {outcome_weight}"
        raise ValueError(f"kl_weight and outcome_weight must be at least 0 and not both 0, {found}")


@register_estimator(
    "outcome",
    family="hybrid",
    target="outcome",
    unbiased=True,
    needs=NEEDS,
    source="policy gradient of the reward with a leave-one-out baseline; the reward part of KDRL, arXiv:2506.02208",
    at_equal="never",
    variants=(Variant({"normalise": True}, "divided by a deviation that depends on the samples", unbiased=False),),
)
def outcome(tokens: TokenBatch, *, normalise: bool = False) -> Estimate:
    """Follow the outcome reward alone, without a teacher and with one number a completion.

    Formula: loss_t = -A log p(y_t), with A the reward minus the mean of the prompt's other completions. Meant for
    comparison, and as a term of a `mix`.

    Args:
        tokens: student log-probabilities, [B, T], nats; rewards and prompts of the rows, [B]; teacher's for the log.
        normalise: divide A by the standard deviation within the prompt.
    """
    return score_function(tokens, -outcome_advantage(tokens, normalise))


@register_estimator(
    "outcome_mix",
    family="hybrid",
    needs=NEEDS,
    source="additive mix as in slime and ROLL, where the outcome part is divided by its deviation",
    check=_check_weights,
    at_equal="never",
    variants=(
        Variant({"kl_weight": 1.0, "outcome_weight": 0.0}, "it is the token estimator", target="reverse_kl",
                unbiased=True, at_equal="sample"),
        Variant({"kl_weight": 0.0, "outcome_weight": 1.0, "normalise": False}, "it is the outcome estimator",
                target="outcome", unbiased=True),
        Variant({"normalise": True}, "the outcome part divided by its deviation"),
    ),
)  # fmt: skip
def outcome_mix(
    tokens: TokenBatch, *, kl_weight: float = 1.0, outcome_weight: float = 1.0, normalise: bool = False
) -> Estimate:
    """Add the policy gradient of the reward to the sampled reverse KL, which tilts the teacher to what is rewarded.

    Formula, with d_t = log p(y_t) - log q(y_t) detached: loss_t = (kl_weight d_t - outcome_weight A) log p(y_t). Its
    expected gradient is the weighted sum of those of the reverse KL, with prefixes fixed, and of minus the reward.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats; rewards and prompts of the rows, [B].
        kl_weight: of the reverse KL.
        outcome_weight: of the reward.
        normalise: divide A by the standard deviation within the prompt.
    """
    cost_BT = kl_weight * log_ratio(tokens) - outcome_weight * outcome_advantage(tokens, normalise)
    return score_function(tokens, cost_BT)


@register_estimator(
    "kdrl",
    family="hybrid",
    needs=NEEDS,
    source="KDRL, arXiv:2506.02208 (KL as reward, or as loss)",
    check=allow(kl_as=one_of(KL_AS), kl_weight=at_least(0)),
    at_equal="never",
    variants=(
        Variant({"kl_as": "reward"}, "follows the sequence reverse KL"),
        Variant({"kl_as": "k3"}, "follows the forward KL"),
        Variant({"kl_as": "k2", "kl_weight": 0.0, "normalise": False}, "it is the outcome estimator", target="outcome",
                unbiased=True),
    ),
)  # fmt: skip
def kdrl(tokens: TokenBatch, *, kl_as: str = "k2", kl_weight: float = 1.0, normalise: bool = False) -> Estimate:
    """Set the KL beside the reward in one of three ways, which follow three different divergences.

    Formula, with d_t = log p(y_t) - log q(y_t). `reward`: the completion's reward is lowered by kl_weight times the sum
    of its d_t before the prompt's completions are compared; expected, the gradient of the *sequence* reverse KL.
    `k2`: loss_t = -A log p(y_t) + kl_weight d_t^2 / 2, the reverse KL with prefixes fixed. `k3`: exp(-d_t) - 1 + d_t in
    its place, the *forward* KL.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats; rewards and prompts of the rows, [B].
        kl_as: `reward`, `k2` or `k3`.
        kl_weight: of the divergence against the reward.
        normalise: divide A by the standard deviation within the prompt.
    """
    assert tokens.rewards_B is not None
    log_ratio_BT = torch.where(tokens.mask_BT, log_ratio(tokens), 0.0)
    if kl_as == "reward":
        lowered_B = upcast(tokens.rewards_B) - kl_weight * log_ratio_BT.detach().sum(1)
        return outcome(replace(tokens, rewards_B=lowered_B), normalise=normalise)
    estimate = outcome(tokens, normalise=normalise)
    penalty_BT = log_ratio_BT.square() / 2 if kl_as == "k2" else k3(log_ratio_BT)
    return Estimate(loss_BT=estimate.loss_BT + kl_weight * penalty_BT, kl_BT=estimate.kl_BT)


def _check_mopd(outcome_weight: float, low: float, high: float, **_: object) -> None:
    at_least(0).check("outcome_weight", outcome_weight)
    if not 0 <= low <= 1 <= high:
        found = f"found {low} and {high}; on-policy every ratio is 1"
        raise ValueError(f"low and high must satisfy 0 <= low <= 1 <= high, {found}")


@register_estimator(
    "mopd",
    family="hybrid",
    needs=NEEDS,
    source="MOPD of MiMo-V2-Flash, arXiv:2601.02780; the band's default is that of arXiv:2603.19220",
    check=_check_mopd,
    at_equal="never",
    corrects=True,
    variants=(
        Variant({"outcome_weight": 0.0}, "on-policy `token`", target="reverse_kl", unbiased=True, at_equal="sample"),
    ),
)
def mopd(
    tokens: TokenBatch,
    *,
    outcome_weight: float = 1.0,
    low: float = 0.5,
    high: float = 2.0,
    normalise: bool = False,
) -> Estimate:
    """Add teacher and reward to one advantage, importance-weighted in a band that drops stale tokens outside it.

    Formula, with w_t the detached ratio of student over sampler where low <= w_t <= high, else 0:
    loss_t = -w_t (log q(y_t) - log p(y_t) + outcome_weight A) log p(y_t). Off-policy the band bounds the variance and
    leaves a bias.

    Args:
        tokens: student, teacher and sampler log-probabilities, [B, T], nats; rewards and prompts of the rows, [B].
        outcome_weight: of the reward.
        low: lower end of the band, 0 to 1.
        high: upper end of the band, at least 1.
        normalise: divide A by the standard deviation within the prompt.
    """
    ratio_BT = importance_ratio(tokens.student_logps_BT.detach(), tokens.sampler_logps_BT)
    cost_BT = log_ratio(tokens) - outcome_weight * outcome_advantage(tokens, normalise)
    weight_BT = banded_ratio(ratio_BT, low, high)
    return score_function(tokens, weight_BT * cost_BT, clipped=weight_BT != ratio_BT)
