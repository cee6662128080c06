"""Estimators that charge a token with the log-ratios of the tokens after it.

A prefix decides where a completion goes: the gradient of the KL over whole sequences has, at each token, the sum of all
later log-ratios, which no single position sees.

>>> import torch
>>> from lit_opd.estimators import build
>>> p, q = torch.tensor([[0.5, 0.5, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.125]]).log()
>>> tokens = TokenBatch(p, q, p, mask_BT=torch.ones_like(p).bool())
>>> for name in ("token", "sequence", "length_normalised"):
...     print(name, build(name)(tokens).loss_BT / p)  # what each token costs, in nats
token tensor([[0.0000, 0.6931, 1.3863]])
sequence tensor([[2.0794, 2.0794, 1.3863]])
length_normalised tensor([[0.6931, 1.0397, 1.3863]])
"""

from __future__ import annotations

from torch import Tensor

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sampled import log_ratio, score_function
from lit_opd.functional.ranges import SHARE, allow, whole
from lit_opd.functional.returns import k_step_return, remaining_mean, return_to_go
from lit_opd.types import Estimate, TokenBatch

__all__ = ["counted", "discounted_reverse_kl", "k_step", "length_normalised", "sequence_reverse_kl"]


def counted(tokens: TokenBatch, values_BT: Tensor) -> Tensor:
    """Detach values and zero them where masked, so that they may be summed into earlier positions.

    Masked first: a special token's log-ratio of -58 would leak into every earlier return.
    """
    return values_BT.detach().masked_fill(~tokens.mask_BT, 0.0)


def discounted_reverse_kl(tokens: TokenBatch, gamma: float) -> Estimate:
    """Weigh the score function by the discounted sum of this and all later log-ratios, [B, T]."""
    return score_function(tokens, return_to_go(counted(tokens, log_ratio(tokens)), gamma))


@register_estimator(
    "sequence",
    family="sequence",
    target="sequence_reverse_kl",
    unbiased=True,
    source="arXiv:2603.25562, eq. of the causal return; MiniLLM, arXiv:2306.08543",
)
def sequence_reverse_kl(tokens: TokenBatch) -> Estimate:
    """Weigh the score function by the sum of this and all later log-ratios, without bias and with most noise.

    Formula, with d_i detached: loss_t = (sum over i >= t of d_i) log p(y_t). Its expected gradient is exactly that of
    KL(student || teacher) over whole sequences; its second moment can grow with the fourth power of the length.
    """
    return discounted_reverse_kl(tokens, gamma=1.0)


@register_estimator(
    "k_step",
    family="sequence",
    target="sequence_reverse_kl",
    source="KETCHUP, arXiv:2504.19024",
    check=allow(steps=whole(), gamma=SHARE),
    variants=(
        Variant({"steps": 1}, "it is the token estimator", target="reverse_kl", unbiased=True),
        Variant({"steps": 2, "gamma": 0.5}, "window and discount"),
    ),
    small={"steps": 2},
)
def k_step(tokens: TokenBatch, *, steps: int = 8, gamma: float = 1.0) -> Estimate:
    """Sum the log-ratios of a window that begins here, whose length trades bias for variance.

    Formula, with d_i detached: loss_t = (sum over i = t .. t + steps - 1 of gamma^(i - t) d_i) log p(y_t). One step is
    `token`; as many as the completion has tokens, without discount, `sequence`.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.
        steps: positions in the window, this one included; the default is a choice of ours.
        gamma: discount within it, 0 to 1.
    """
    return score_function(tokens, k_step_return(counted(tokens, log_ratio(tokens)), steps, gamma))


@register_estimator(
    "length_normalised",
    family="sequence",
    target="sequence_reverse_kl",
    source="MiniLLM, arXiv:2306.08543 (length normalisation)",
)
def length_normalised(tokens: TokenBatch) -> Estimate:
    """Score each token by the mean of this and all later log-ratios, so that early ones weigh less than in `sequence`.

    Formula, with d_i detached and n_t the counted positions from t on: loss_t = (1 / n_t) (sum over i >= t of d_i) log
    p(y_t). n_t depends on what is sampled after t, so that the target is no longer a KL: short endings are weighed up.
    """
    return score_function(tokens, remaining_mean(counted(tokens, log_ratio(tokens)), tokens.mask_BT))
