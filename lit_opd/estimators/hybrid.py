"""Estimators between the families of tokens and of sequences.

One number, gamma, says how far a token also pays for those after it.

>>> import torch
>>> p, q = torch.tensor([[0.5, 0.5, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.125]]).log()
>>> tokens = TokenBatch(p, q, p, mask_BT=torch.ones_like(p).bool())
>>> for gamma in (0.0, 0.5, 1.0):
...     print(gamma, hybrid_reverse_kl(tokens, gamma=gamma).loss_BT / p)  # what each token costs, in nats
0.0 tensor([[0.0000, 0.6931, 1.3863]])
0.5 tensor([[0.6931, 1.3863, 1.3863]])
1.0 tensor([[2.0794, 2.0794, 1.3863]])
"""

from __future__ import annotations

from lit_opd.estimators.contract import Variant
from lit_opd.estimators.registry import register_estimator
from lit_opd.estimators.sequence import discounted_reverse_kl
from lit_opd.functional.ranges import SHARE, allow
from lit_opd.types import Estimate, TokenBatch

__all__ = ["hybrid_reverse_kl"]


@register_estimator(
    "hybrid",
    family="hybrid",
    target="sequence_reverse_kl",
    source="arXiv:2603.25562, discounted return",
    check=allow(gamma=SHARE),
    variants=(
        Variant({"gamma": 1.0}, "undiscounted, it is the sequence estimator", unbiased=True),
        Variant({"gamma": 0.0}, "it is the token estimator", target="reverse_kl", unbiased=True),
    ),
)
def hybrid_reverse_kl(tokens: TokenBatch, *, gamma: float = 0.5) -> Estimate:
    """Discount later log-ratios by gamma, which trades bias (most at 0, `token`) for variance (most at 1, `sequence`).

    Formula, with d_i detached: loss_t = (sum over i >= t of gamma^(i - t) d_i) log p(y_t). Bias against the sequence
    reverse KL shrinks as gamma grows, variance grows.

    Args:
        tokens: student and teacher log-probabilities, [B, T], nats, and the mask.
        gamma: discount, 0 to 1.
    """
    return discounted_reverse_kl(tokens, gamma)
