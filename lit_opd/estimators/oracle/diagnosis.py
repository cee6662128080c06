"""What an estimator does, whatever its name: its expected gradient beside every known one, and known ways to fail."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.oracle import (
    TARGETS,
    TabularPair,
    exact_gradient,
    trace_variance,
    trajectory_gradients,
)
from lit_opd.estimators.oracle.batches import example_batch, loss_and_gradients, table_for
from lit_opd.estimators.terms import build
from lit_opd.types import Estimate, Need, TokenBatch

__all__ = ["Comparison", "Diagnosis", "diagnose"]

_ROUNDING = 1e-10


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


class Diagnosis(NamedTuple):
    """What was found on small models whose completions can all be written down.

    Attributes:
        comparisons: one for each known objective, `outcome` only where the estimator reads rewards.
        relative_variance: trace of the gradient's covariance over that of the plain sampled reverse KL.
        expected_norm: norm of the expected gradient.
        rms: root of the expected squared norm of one sample's gradient.
        norm_at_equal: norm of the expected gradient where student == teacher.
        rms_at_equal: root of the expected squared norm there.
        dead: the expected gradient is zero while that of samples is not: it trains nothing but noise.
        silent: no completion that the student itself writes has any gradient.
        action_independent: the derivative by the sampled token's log-probability is the same whichever token was
            sampled, and there is no other path: the expected gradient of such a position is zero.
        ignores_teacher: another teacher would give the same gradients.
        learns_from_samples: the log-probability of a sampled token, or of one of a demonstration, gets a gradient.
        whitened: positions share a scale, and twice as large log-ratios give the same gradient: how far the student is
            from the teacher is lost.
    """

    comparisons: tuple[Comparison, ...]
    relative_variance: float
    expected_norm: float
    rms: float
    norm_at_equal: float
    rms_at_equal: float
    dead: bool
    silent: bool
    action_independent: bool
    ignores_teacher: bool
    learns_from_samples: bool
    whitened: bool

    @property
    def nearest(self) -> Comparison:
        """The objective whose gradient points most nearly the same way; of several, the least biased."""
        return max(self.comparisons, key=lambda c: (round(c.cosine, 9), -c.relative_bias))


def diagnose(estimator: BoundEstimator, pair: TabularPair | None = None) -> Diagnosis:
    """Look at an estimator's gradients on small models, exactly and without sampling.

    Args:
        estimator: what to look at.
        pair: the models; by default ones that its support fits into.
    """
    pair = pair or table_for(estimator)
    probs_S, gradients_SG = trajectory_gradients(pair, estimator)
    expected_G, rms = probs_S @ gradients_SG, _rms(probs_S, gradients_SG)
    at_equal_S, at_equal_SG = trajectory_gradients(pair.with_equal_models(), estimator)
    if expected_G.norm() <= _ROUNDING * rms:
        expected_G = torch.zeros_like(expected_G)  # the direction of rounding errors would mean nothing
    expected_norm = float(expected_G.norm())
    return Diagnosis(
        comparisons=_compare(estimator, pair, expected_G),
        relative_variance=trace_variance(pair, estimator) / trace_variance(pair, build("token")),
        expected_norm=expected_norm,
        rms=rms,
        norm_at_equal=float((at_equal_S @ at_equal_SG).norm()),
        rms_at_equal=_rms(at_equal_S, at_equal_SG),
        dead=expected_norm == 0 and rms > 0,
        silent=rms == 0,
        action_independent=_is_action_independent(estimator, pair),
        ignores_teacher=_ignores_teacher(estimator, pair, gradients_SG),
        learns_from_samples=_learns_from_samples(estimator),
        whitened=_is_whitened(estimator),
    )


def _rms(probs_S: Tensor, gradients_SG: Tensor) -> float:
    return float(probs_S @ gradients_SG.square().sum(1)) ** 0.5


def _compare(estimator: BoundEstimator, pair: TabularPair, found_G: Tensor) -> tuple[Comparison, ...]:
    own = {name: estimator.keywords[name] for name in ("teacher_weight", "skew") if name in estimator.keywords}
    found = []
    for target in TARGETS:
        wanted_G = exact_gradient(pair, target, **own)
        if wanted_G.norm() == 0 or (target == "outcome" and Need.REWARDS not in estimator.needs):
            continue
        cosine = float(torch.cosine_similarity(found_G, wanted_G, dim=0))
        ratio, bias = (float(x.norm() / wanted_G.norm()) for x in (found_G, found_G - wanted_G))
        found.append(Comparison(target, cosine, ratio, bias))
    return tuple(found)


def _is_action_independent(estimator: BoundEstimator, pair: TabularPair) -> bool:
    """Whether every sample's gradient is one constant times the score function, at a single position."""
    table = TabularPair.random(pair.student_logits_CV.shape[1], 1, pair.seed + 1)
    _, gradients_SG = trajectory_gradients(table, estimator)
    needs = {Need.TOKEN} | (estimator.needs & {Need.GROUPS})
    _, scores_SG = trajectory_gradients(
        table, BoundEstimator(EstimatorSpec("score", _score, "sequence", needs=frozenset(needs)), {})
    )
    constant = (gradients_SG * scores_SG).sum() / scores_SG.square().sum()
    rest = (gradients_SG - constant * scores_SG).norm()
    return bool(gradients_SG.norm() > 0 and rest <= _ROUNDING * gradients_SG.norm())


def _score(tokens: TokenBatch) -> Estimate:
    return Estimate(tokens.student_logps_BT, tokens.teacher_logps_BT)


def _ignores_teacher(estimator: BoundEstimator, pair: TabularPair, gradients_SG: Tensor) -> bool:
    vocabulary = pair.student_logits_CV.shape[1]
    other = TabularPair.random(vocabulary, pair.horizon, pair.seed + 1).teacher_logits_CV
    _, others_SG = trajectory_gradients(replace(pair, teacher_logits_CV=other), estimator)
    return bool((others_SG - gradients_SG).norm() <= _ROUNDING * gradients_SG.norm())


def _learns_from_samples(estimator: BoundEstimator) -> bool:
    _, gradients = loss_and_gradients(estimator, example_batch(estimator))
    return bool(gradients["student_logps_BT"].any())


def _is_whitened(estimator: BoundEstimator) -> bool:
    """Whether a position's gradient depends on other positions' teacher, but not on the scale of all log-ratios."""
    tokens = example_batch(estimator)
    if tokens.groups_B is not None:  # one group: two values brought to unit variance are +-1 whatever they are
        tokens = replace(tokens, groups_B=torch.zeros_like(tokens.groups_B))
    # Small, so that nothing is clipped; at all but the first position, the batch `elsewhere` is twice as far.
    near, far, elsewhere = (
        _at_distance(tokens, 0.1, 0.1),
        _at_distance(tokens, 0.2, 0.2),
        _at_distance(tokens, 0.1, 0.2),
    )
    one, two, other = (loss_and_gradients(estimator, batch)[1] for batch in (near, far, elsewhere))
    size = sum(gradient.norm() for gradient in one.values())
    moved = sum((two[name] - one[name]).norm() for name in one)
    coupled = sum((other[name][0, 0] - one[name][0, 0]).norm() for name in one)
    return bool(size > 0 and moved < 1e-4 * size and coupled > 1e-4 * size)


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
