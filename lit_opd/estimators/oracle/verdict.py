"""Judge what an estimator does, whatever its name: beside every known gradient, and by known ways to fail.

The laws, the linter's probes, the command `check` and the tests all ask the one `Verdict` that is made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.oracle.batches import example_batch, loss_and_gradients
from lit_opd.estimators.oracle.objectives import TARGETS, exact_gradient
from lit_opd.estimators.oracle.samples import Gradients, trace_variance, trajectory_gradients
from lit_opd.estimators.oracle.tabular import TabularPair, pair_for
from lit_opd.estimators.terms import build
from lit_opd.types import Estimate, Need, TokenBatch

__all__ = ["EXACT", "Comparison", "Verdict", "declared_target", "verify"]

EXACT = 1e-10


class Comparison(NamedTuple):
    """An estimator's expected gradient beside that of an objective.

    Attributes:
        target: the objective.
        cosine: between the two; 0 where the expected gradient is zero.
        norm_ratio: norm of the expected gradient over that of the objective's.
        relative_bias: norm of their difference over that of the objective's; 0 where they are the same.
    """

    target: str
    cosine: float
    norm_ratio: float
    relative_bias: float


@dataclass(frozen=True)
class Verdict:
    """The gradient of an estimator on two models whose completions can all be written down.

    Every value is exact up to rounding, and computed when it is asked for.

    Attributes:
        estimator: what is judged.
        pair: the two models.
        target: the objective it is compared with; None where it declares none.
    """

    estimator: BoundEstimator
    pair: TabularPair
    target: str | None = None

    @cached_property
    def gradients(self) -> Gradients:
        """The gradients of all samples."""
        return trajectory_gradients(self.pair, self.estimator)

    @cached_property
    def at_equal(self) -> Gradients:
        """The gradients of all samples where the student is its own teacher."""
        return trajectory_gradients(self.pair.with_equal_models(), self.estimator)

    def compare(self, target: str) -> Comparison:
        """Compare the expected gradient with that of an objective.

        Raises:
            ValueError: an unknown objective.
        """
        given = self.estimator.keywords
        own = {name: given[name] for name in ("teacher_weight", "skew") if name in given}
        wanted_G, found_G = exact_gradient(self.pair, target, **own), self.gradients.expected_G
        if self.expected_norm == 0:
            found_G = torch.zeros_like(found_G)  # the direction of rounding errors would mean nothing
        cosine = float(torch.cosine_similarity(found_G, wanted_G, dim=0))
        ratio, bias = (float(x.norm() / wanted_G.norm()) for x in (found_G, found_G - wanted_G))
        return Comparison(target, cosine, ratio, bias)

    @cached_property
    def _with_target(self) -> Comparison | None:
        return None if self.target is None else self.compare(self.target)

    @property
    def relative_bias(self) -> float | None:
        """Norm of (expected gradient - target gradient) over that of the target, or None without a target."""
        return None if self._with_target is None else self._with_target.relative_bias

    @property
    def cosine(self) -> float | None:
        """Cosine between the expected gradient and the target's, or None without a target."""
        return None if self._with_target is None else self._with_target.cosine

    @property
    def is_unbiased(self) -> bool | None:
        """True where the expected gradient is the target's, None without a target."""
        return None if self.relative_bias is None else self.relative_bias < EXACT

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """One for each known objective that has a gradient, `outcome` only where the estimator reads rewards."""
        targets = [name for name in TARGETS if name != "outcome" or Need.REWARDS in self.estimator.needs]
        return tuple(self.compare(name) for name in targets if exact_gradient(self.pair, name).norm() > 0)

    @property
    def nearest(self) -> Comparison:
        """The objective whose gradient points most nearly the same way, and is least biased among equals."""
        return max(self.comparisons, key=lambda c: (round(c.cosine, 9), -c.relative_bias))

    @property
    def expected_norm(self) -> float:
        """Norm of the expected gradient, 0 where it is nothing but rounding."""
        norm = float(self.gradients.expected_G.norm())
        return 0.0 if norm <= EXACT * self.rms else norm

    @property
    def rms(self) -> float:
        """Root of the expected squared norm of one sample's gradient."""
        return self.gradients.second_moment**0.5

    @cached_property
    def trace_variance(self) -> float:
        """Trace of the covariance of one completion's gradient."""
        return trace_variance(self.pair, self.estimator, self.gradients)

    @property
    def relative_variance(self) -> float:
        """The trace variance over that of the plain sampled reverse KL."""
        return self.trace_variance / trace_variance(self.pair, build("token"))

    @property
    def norm_at_equal(self) -> float:
        """Norm of the expected gradient where the student equals the teacher."""
        return float(self.at_equal.expected_G.norm())

    @property
    def rms_at_equal(self) -> float:
        """Root of the second moment there: zero only if no single completion has a gradient."""
        return self.at_equal.second_moment**0.5

    @property
    def dead(self) -> bool:
        """True where samples have gradients and their expectation is zero: it trains nothing but noise."""
        return self.expected_norm == 0 and self.rms > 0

    @property
    def silent(self) -> bool:
        """True where no completion that the student itself writes has any gradient."""
        return self.rms == 0

    @cached_property
    def action_independent(self) -> bool:
        """True where every sample's gradient is one constant times the score function, at a single position.

        The derivative by the sampled token's log-probability is then the same whichever token was sampled, and there is
        no other path: the expected gradient of such a position is zero.
        """
        table = TabularPair.random(self.pair.student_logits_CV.shape[1], 1, self.pair.seed + 1)
        _, gradients_SG = trajectory_gradients(table, self.estimator)
        needs = frozenset({Need.TOKEN}) | (self.estimator.needs & {Need.GROUPS})
        score = BoundEstimator(EstimatorSpec("score", _score, "sequence", needs=needs), {})
        _, scores_SG = trajectory_gradients(table, score)
        constant = (gradients_SG * scores_SG).sum() / scores_SG.square().sum()
        rest = (gradients_SG - constant * scores_SG).norm()
        return bool(gradients_SG.norm() > 0 and rest <= EXACT * gradients_SG.norm())

    @cached_property
    def ignores_teacher(self) -> bool:
        """True where another teacher would give the same gradients."""
        vocabulary, gradients_SG = self.pair.student_logits_CV.shape[1], self.gradients.gradients_SG
        other = TabularPair.random(vocabulary, self.pair.horizon, self.pair.seed + 1).teacher_logits_CV
        _, others_SG = trajectory_gradients(replace(self.pair, teacher_logits_CV=other), self.estimator)
        return bool((others_SG - gradients_SG).norm() <= EXACT * gradients_SG.norm())

    @cached_property
    def learns_from_samples(self) -> bool:
        """True where the log-probability of a sampled token, or of one of a demonstration, gets a gradient."""
        _, gradients = loss_and_gradients(self.estimator, example_batch(self.estimator))
        return bool(gradients["student_logps_BT"].any())

    @cached_property
    def whitened(self) -> bool:
        """True where positions share a scale, and twice as large log-ratios give the same gradient.

        How far the student is from the teacher is then lost.
        """
        tokens = example_batch(self.estimator)
        if tokens.groups_B is not None:  # one group: two values brought to unit variance are +-1 whatever they are
            tokens = replace(tokens, groups_B=torch.zeros_like(tokens.groups_B))
        # Small, so that nothing is clipped; at all but the first position, the third batch is twice as far.
        distances = ((0.1, 0.1), (0.2, 0.2), (0.1, 0.2))
        batches = (_at_distance(tokens, first, others) for first, others in distances)
        one, two, other = (loss_and_gradients(self.estimator, batch)[1] for batch in batches)
        size = sum(gradient.norm() for gradient in one.values())
        moved = sum((two[name] - one[name]).norm() for name in one)
        coupled = sum((other[name][0, 0] - one[name][0, 0]).norm() for name in one)
        return bool(size > 0 and moved < 1e-4 * size and coupled > 1e-4 * size)


def declared_target(estimator: BoundEstimator) -> str | None:
    """Read the target an estimator declares with its keywords."""
    return estimator.contract.target


def verify(estimator: BoundEstimator, pair: TabularPair | None = None, target: str | None = None) -> Verdict:
    """Judge an estimator by its gradients on small models, by default beside the target that it declares.

    Raises:
        ValueError: the estimator's loss is not one value a position, or its support is larger than the vocabulary.
    """
    verdict = Verdict(estimator, pair or pair_for(estimator), target or declared_target(estimator))
    _ = verdict.gradients  # what is wrong with the estimator shows here
    return verdict


def _score(tokens: TokenBatch) -> Estimate:
    return Estimate(tokens.student_logps_BT, tokens.teacher_logps_BT)


def _at_distance(tokens: TokenBatch, first: float, others: float) -> TokenBatch:
    """Every log-ratio times a factor: `first` at the first position of the first row, `others` at the others."""
    factor_BT = torch.full(tokens.mask_BT.shape, others, dtype=torch.float64)
    factor_BT[0, 0] = first
    moved = {}
    for name in ("logps_BT", "support_logps_BTK", "full_logps_BTV"):
        student, teacher = (getattr(tokens, f"{model}_{name}") for model in ("student", "teacher"))
        if teacher is not None:
            factor = factor_BT.reshape(factor_BT.shape + (1,) * (teacher.dim() - 2))
            moved[f"teacher_{name}"] = student - factor * (student - teacher)
    if tokens.kl_BT is not None:  # the student's mean of log-ratios
        moved["kl_BT"] = factor_BT * tokens.kl_BT
    return replace(tokens, **moved)
