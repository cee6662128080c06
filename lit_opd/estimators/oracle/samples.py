"""Compute what every completion contributes to the gradient under an estimator, and the moments of that.

Shapes as in `tabular`, and: S samples, which are completions or, for estimators that compare the completions of one
prompt, all pairs of them; G is C * V, one coordinate for every student logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_opd.estimators.contract import BoundEstimator, Term
from lit_opd.estimators.needs import Seen, fill
from lit_opd.estimators.oracle.objectives import probabilities
from lit_opd.estimators.oracle.tabular import TabularPair
from lit_opd.types import Need, TokenBatch

_GROUP = 2


class Gradients(NamedTuple):
    """Probability of each sample [S], and its gradient [S, G]."""

    probs_S: Tensor
    gradients_SG: Tensor

    @property
    def expected_G(self) -> Tensor:
        """The expected gradient."""
        return self.probs_S @ self.gradients_SG

    @property
    def second_moment(self) -> float:
        """The expected squared norm of a sample's gradient."""
        return float(self.probs_S @ self.gradients_SG.square().sum(1))


def trajectory_gradients(pair: TabularPair, estimator: BoundEstimator) -> Gradients:
    """Compute what every sample contributes to the gradient, that of its sum of counted losses.

    A mix is evaluated term by term, as in training. Where a term compares the completions of one prompt, a sample is a
    pair of completions and its gradient the mean of both; otherwise it is one completion.

    Raises:
        ValueError: the estimator's loss is not one value a position, or its support is larger than the vocabulary.
    """
    ids_BT, mask_BT, contexts_BT = pair.completions()
    rows = Completions(ids_BT, mask_BT, contexts_BT, pair.rewards())
    size = _group_size(estimator)
    samples_SG = torch.cartesian_prod(*[torch.arange(len(ids_BT))] * size).reshape(-1, size)
    probs_S = probabilities(pair, pair.law_logps_CV)[samples_SG].prod(1)
    return Gradients(probs_S, sample_gradients(pair, estimator, rows, samples_SG))


class Completions(NamedTuple):
    """Completions of a pair of tables: ids, mask, the context each token is chosen from, and rewards."""

    ids_BT: Tensor
    mask_BT: Tensor
    contexts_BT: Tensor
    rewards_B: Tensor


def sample_gradients(pair: TabularPair, estimator: BoundEstimator, rows: Completions, samples_SG: Tensor) -> Tensor:
    """Differentiate each of the given samples, [S, G], as the mean over its completions, `samples_SG` of the rows.

    Raises:
        ValueError: as in `trajectory_gradients`.
    """
    samples, size = samples_SG.shape
    owner = torch.arange(samples).repeat_interleave(size)
    ids_BT, mask_BT, contexts_BT, rewards_B = (values[samples_SG.flatten()] for values in rows)
    # Every sample has its own copy of the table, so that one backward pass keeps their gradients apart.
    table_SCV = pair.student_logits_CV.repeat(samples, 1, 1).requires_grad_()
    student_BTV = table_SCV.log_softmax(-1)[owner[:, None], contexts_BT]
    view = _View(pair, student_BTV, ids_BT, mask_BT, contexts_BT, rewards_B, owner)
    total = 0.0 * table_SCV.sum()  # so that a loss without any gradient has the gradient zero
    for term in estimator.terms:
        loss_BT = term(view.tokens(term)).loss_BT
        if loss_BT.shape != mask_BT.shape:
            expected = f"one loss a position, {tuple(mask_BT.shape)}, found {tuple(loss_BT.shape)}"
            raise ValueError(f"{term.estimator.spec.name} must return {expected}")
        total = total + term.weight * torch.where(mask_BT, loss_BT, 0.0).sum() / size
    (gradients_SCV,) = torch.autograd.grad(total, table_SCV)
    return gradients_SCV.flatten(1)


def _group_size(estimator: BoundEstimator) -> int:
    return _GROUP if Need.GROUPS in estimator.needs else 1


class _View(NamedTuple):
    """The rows of a batch, from which each term is given only what it declares to need."""

    pair: TabularPair
    student_BTV: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    contexts_BT: Tensor
    rewards_B: Tensor
    groups_B: Tensor

    def tokens(self, term: Term) -> TokenBatch:
        """Fill the needs of a term, with padding and not zeros at masked positions, so that a forgotten mask shows."""
        student_BTV, teacher_BTV = self.student_BTV, self._log_softmax(self.pair.teacher_logits_CV)
        sampled = TokenBatch(
            self._taken(student_BTV), self._taken(teacher_BTV), self._taken(self.pair.law_logps_CV[self.contexts_BT]),
            self.mask_BT, completion_ids_BT=self.ids_BT, progress=0.5,
        )  # fmt: skip
        seen = Seen(
            student_BTV,
            teacher_BTV,
            k=term.estimator.support_size,
            support=term.estimator.support,
            reference_logps=self._taken(self._log_softmax(self.pair.reference_logits_CV)),
            rewards_B=self.rewards_B,
            groups_B=self.groups_B,
        )
        return fill(sampled, term.needs, seen)

    def _log_softmax(self, logits_CV: Tensor) -> Tensor:
        return logits_CV.log_softmax(-1)[self.contexts_BT]

    def _taken(self, logps_BTV: Tensor) -> Tensor:
        return logps_BTV.gather(-1, self.ids_BT[..., None]).squeeze(-1)


def expected_gradient(pair: TabularPair, estimator: BoundEstimator) -> Tensor:
    """Compute the exact expectation, over what the sampler writes, of the gradient of a completion's loss, [G]."""
    return trajectory_gradients(pair, estimator).expected_G


def second_moment(pair: TabularPair, estimator: BoundEstimator) -> float:
    """Compute the expected squared norm of a sample's gradient, zero only if every sample's gradient is."""
    return trajectory_gradients(pair, estimator).second_moment


def trace_variance(pair: TabularPair, estimator: BoundEstimator, known: Gradients | None = None) -> float:
    """Compute the trace of the gradient's covariance per completion, for pairs twice that of their mean."""
    probs_S, gradients_SG = known or trajectory_gradients(pair, estimator)
    return _group_size(estimator) * float(probs_S @ (gradients_SG - probs_S @ gradients_SG).square().sum(1))
