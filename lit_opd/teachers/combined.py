"""Combine what several teachers say of the same tokens, as a mixture of their probabilities or as a product.

`RoutedScorer` calls it for rows that have several teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.functional import log_softmax
from lit_opd.teachers.scorer import Wanted
from lit_opd.types import Distributions, Scores

__all__ = ["Combined", "Interleaved", "check_product", "combine", "interleave"]

EXACT = ("reverse_kl", "sequence_reverse_kl")  # targets that are linear in the teacher's log-probabilities


@dataclass(frozen=True)
class Combined:
    """Distributions of several teachers as one, made a few positions at a time.

    Attributes:
        parts: the teachers'.
        weights_NM: the weight of each teacher at each position, rows of sum 1.
        combined: `mixture`: log sum_m w_m p_m. `product`: sum_m w_m log p_m, which is not normalised. `geometric`: the
            same, normalised.
    """

    parts: Sequence[Distributions]
    weights_NM: Tensor
    combined: str

    def __len__(self) -> int:
        """Count the positions, N."""
        return len(self.weights_NM)

    def __getitem__(self, index: Tensor | slice) -> Combined:
        """Choose positions."""
        return replace(self, parts=[part[index] for part in self.parts], weights_NM=self.weights_NM[index])

    def logps(self, part: slice) -> Tensor:
        """Make log-probabilities [c, V], nats, of a slice of positions, holding two chunks at a time."""
        first, *others = self.parts
        weights_Mc1 = self.weights_NM[part].T[..., None]
        found_cV = weigh(first.logps(part), weights_Mc1[0], self.combined)
        for other, weight_c1 in zip(others, weights_Mc1[1:], strict=True):
            found_cV = join(found_cV, weigh(other.logps(part), weight_c1, self.combined), self.combined)
        return log_softmax(found_cV) if self.combined == "geometric" else found_cV


@dataclass(frozen=True)
class Interleaved:
    """Distributions at positions of different teachers, in the order of the positions.

    Attributes:
        parts: the distributions at the positions of each, in their order.
        owner_N: whose position each is.
    """

    parts: Sequence[Distributions]
    owner_N: Tensor

    def __len__(self) -> int:
        """Count the positions, N."""
        return len(self.owner_N)

    def __getitem__(self, index: Tensor | slice) -> Interleaved:
        """Choose positions."""
        owner_N, own_N = self.owner_N[index], _places(self.owner_N)[index]
        parts = [part[own_N[owner_N == number]] for number, part in enumerate(self.parts)]
        return Interleaved(parts, owner_N)

    def logps(self, part: slice) -> Tensor:
        """Make log-probabilities [c, V], nats, of a slice of positions."""
        owner_c = self.owner_N[part]
        before = [int((self.owner_N[: part.start] == number).sum()) for number in range(len(self.parts))]
        counts = [int((owner_c == number).sum()) for number in range(len(self.parts))]
        sides = zip(self.parts, before, counts, strict=True)
        found_cV = torch.cat([one.logps(slice(start, start + count)) for one, start, count in sides])
        return found_cV[_sorted_places(owner_c)]


def interleave(scores: Sequence[Scores], owner_N: Tensor) -> Scores:
    """Put the answers about different rows together, in the order of the positions.

    Args:
        scores: about the positions of each owner, in their order.
        owner_N: whose position each is.
    """
    if len(scores) == 1:
        return scores[0]
    order_N = _sorted_places(owner_N)

    def joined(name: str) -> Tensor | None:
        values = [getattr(one, name) for one in scores]
        return None if values[0] is None else torch.cat(values)[order_N]

    full = [one.full for one in scores if one.full is not None]
    return Scores(joined("logps_N"), joined("support_ids_NK"), joined("support_logps_NK"),
                  Interleaved(full, owner_N) if full else None)  # fmt: skip


def _sorted_places(owner_N: Tensor) -> Tensor:
    """Find the place of each position where those of the first owner come first, then those of the second, ..."""
    order_N = torch.argsort(owner_N, stable=True)
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))


def _places(owner_N: Tensor) -> Tensor:
    """Count, at each position, those before it of the same owner."""
    counts_P = torch.bincount(owner_N)
    return _sorted_places(owner_N) - (counts_P.cumsum(0) - counts_P)[owner_N]


def combine(
    scores: Sequence[Scores], ids_N: Tensor, weights_NM: Tensor, combined: str, wanted: Wanted, rows: int
) -> Scores:
    """Make one answer of several teachers' about the same tokens.

    Args:
        scores: each teacher's; where a support is wanted they hold whole distributions, whose own K tokens it has.
        ids_N: the tokens.
        weights_NM: the weight of each teacher at each position, rows of sum 1.
        combined: as in `Combined`.
        wanted: what the answer has to hold.
        rows: positions to look at at once.
    """
    full = [one.full for one in scores if one.full is not None]
    whole = Combined(full, weights_NM, combined) if len(full) == len(scores) else None
    if wanted.full:
        return Scores(full=whole)
    if not wanted.support:
        return Scores(_tokens(scores, weights_NM, combined))
    assert whole is not None
    found = []
    for start in range(0, max(len(whole), 1), rows):
        part = slice(start, min(start + rows, len(whole)))
        logps_cV = whole.logps(part)
        found.append((logps_cV.gather(-1, ids_N[part, None]).squeeze(-1), *logps_cV.topk(wanted.support)))
    logps_N, support_logps_NK, support_ids_NK = (torch.cat(values) for values in zip(*found, strict=True))
    return Scores(logps_N, support_ids_NK, support_logps_NK)


def check_product(estimator: BoundEstimator) -> None:
    """Refuse estimators for which a product of teachers is not the weighted sum of their KLs.

    The reverse KL is linear in the teacher's log-probabilities: sum_m w_m KL(p || q_m) is E_p[log p - sum_m w_m log
    q_m], the KL to the unnormalised geometric mean. What estimates its gradient without bias, by token or over
    sequences, is therefore exact with sum_m w_m log q_m in the teacher's place. Other divergences, and biased
    estimators, would make of it something that nobody asked for.

    Raises:
        UserError: the estimator, or a term of it, is another.
    """
    for term in estimator.terms:
        contract = term.estimator.contract
        if term.weighting is not None or not contract.unbiased or contract.target not in EXACT:
            expected = "an unbiased estimator of the reverse KL, for which a product of teachers is a sum of KLs"
            found = f"{term.estimator.spec.name!r}"
            raise UserError("teachers_combined", expected, found, "Set it to mixture, or estimator.name=token.")


def weigh(logps: Tensor, weights: Tensor, combined: str) -> Tensor:
    """Give log-probabilities the weight of their teacher."""
    return logps + weights.log() if combined == "mixture" else logps * weights


def join(one: Tensor, other: Tensor, combined: str) -> Tensor:
    """Put two teachers' weighted log-probabilities together."""
    return torch.logaddexp(one, other) if combined == "mixture" else one + other


def _tokens(scores: Sequence[Scores], weights_NM: Tensor, combined: str) -> Tensor:
    """Combine log-probabilities of the sampled tokens, which alone cannot be normalised."""
    parts = []
    for one, weight_N in zip(scores, weights_NM.T, strict=True):
        assert one.logps_N is not None
        parts.append(weigh(one.logps_N, weight_N, combined))
    found_N = parts[0]
    for part in parts[1:]:
        found_N = join(found_N, part, combined)
    return found_N
