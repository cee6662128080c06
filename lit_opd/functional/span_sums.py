"""Sum values of tokens over the spans of text that they are parts of.

A teacher with another tokenizer is compared with the student by spans. A span stands at its last token.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ends_of_spans", "sum_spans"]


def ends_of_spans(spans_N: Tensor) -> Tensor:
    """Find the last token of every span, [N], of which tokens of none (-1) are no part.

    >>> ends_of_spans(torch.tensor([4, 4, -1, 2]))
    tensor([False,  True, False,  True])
    """
    after_N = torch.cat([spans_N[1:], spans_N.new_full((1,), -1)])
    return (spans_N >= 0) & (spans_N != after_N)


def sum_spans(values_N: Tensor, spans_N: Tensor) -> Tensor:
    """Sum values over each span, and put the sum at its last token and zero elsewhere.

    Args:
        values_N: of the tokens. The gradient of a sum reaches every token of its span.
        spans_N: the number of the span that each token is in, -1 for none. Tokens of a span lie together.

    >>> sum_spans(torch.tensor([1.0, 2.0, 8.0, 5.0]), torch.tensor([4, 4, -1, 2]))
    tensor([0., 3., 0., 5.])
    """
    ends_N, inside_N = ends_of_spans(spans_N), spans_N >= 0
    place_N = ends_N.cumsum(0) - ends_N.long()  # how many spans ended before
    sums_S = values_N.new_zeros(int(ends_N.sum())).index_add(0, place_N[inside_N], values_N[inside_N])
    return torch.zeros_like(values_N).masked_scatter(ends_N, sums_S)
