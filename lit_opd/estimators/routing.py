"""Estimators that put the teacher beside an outcome reward: to scale its advantages, or to take over what failed.

Both were published with the student itself as the teacher, shown more than the student sees. Here the teacher is
whatever the run's teacher is.

>>> p, q = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.25], [0.25]]).log()
>>> tokens = TokenBatch(
...     p, q, p, torch.ones_like(p).bool(), rewards_B=torch.tensor([1.0, 0.0]), groups_B=torch.tensor([7, 7])
... )
>>> srpo(tokens).loss_BT / p  # the first passes, at the cost -A = -1; the second costs its log-ratio
tensor([[-1.0000],
        [ 0.6931]])
"""

from __future__ import annotations

import torch

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.outcomes import NEEDS, outcome_advantage
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import log_ratio, score_function
from lit_opd.functional.precision import upcast
from lit_opd.functional.ranges import FINITE, SHARE, allow, at_least
from lit_opd.types import Estimate, TokenBatch

__all__ = ["rlsd", "srpo"]


@register_estimator(
    "rlsd",
    family="hybrid",
    target="outcome",
    needs=NEEDS,
    source="RLSD, arXiv:2604.03128 (without the decay of the teacher's share)",
    check=allow(max_change=SHARE),
    at_equal="never",
    variants=(
        Variant({"max_change": 0.0, "normalise": False}, "it is the outcome estimator", unbiased=True),
        Variant({"normalise": True}, "the outcome advantage divided by its deviation"),
    ),
)
def rlsd(tokens: TokenBatch, *, max_change: float = 0.2, normalise: bool = False) -> Estimate:
    """Scale the policy gradient of the reward token by token with the teacher, which never turns its direction.

    Formula, with A the outcome advantage, p student and q teacher, all detached:
    loss_t = -A clip((q(y_t) / p(y_t))^sign(A), 1 - max_change, 1 + max_change) log p(y_t). In a completion that did
    well, tokens that the teacher finds more probable get a larger advantage; in one that did badly, a smaller cost.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats; rewards and prompts of the rows, [B].
        max_change: how far the factor may leave 1.
        normalise: divide A by the standard deviation within the prompt.
    """
    advantage_B1 = outcome_advantage(tokens, normalise)
    evidence_BT = (-advantage_B1.sign() * log_ratio(tokens)).exp()
    factor_BT = evidence_BT.clamp(1 - max_change, 1 + max_change)
    return score_function(tokens, -advantage_B1 * factor_BT, clipped=factor_BT != evidence_BT)


@register_estimator(
    "srpo",
    family="hybrid",
    needs=NEEDS,
    source="SRPO, arXiv:2604.02288 (routing, with the sampled KL and without its entropy weights)",
    check=allow(pass_reward=FINITE, kl_weight=at_least(0)),
    at_equal="never",
    variants=(Variant({"normalise": True}, "the outcome advantage divided by its deviation"),),
)
def srpo(tokens: TokenBatch, *, pass_reward: float = 1.0, kl_weight: float = 1.0, normalise: bool = False) -> Estimate:
    """Learn from the reward where a completion passes and from the teacher where it fails, each where it says most.

    Formula, with d_t = log p(y_t) - log q(y_t) and the outcome advantage A detached: loss_t = -A log p(y_t) in a
    completion that passes, kl_weight d_t log p(y_t) in one that fails. Failed completions count in the A of the others.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats; rewards and prompts of the rows, [B].
        pass_reward: the smallest reward of a completion that passes.
        kl_weight: of the teacher's signal against the reward's.
        normalise: divide A by the standard deviation within the prompt.
    """
    assert tokens.rewards_B is not None
    passes_B1 = (upcast(tokens.rewards_B) >= pass_reward)[:, None]
    advantage_B1 = outcome_advantage(tokens, normalise)
    return score_function(tokens, torch.where(passes_B1, -advantage_B1, kl_weight * log_ratio(tokens)))
