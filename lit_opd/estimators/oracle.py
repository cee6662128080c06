"""What gradient does an estimator really have? Exact answers, by writing down every completion there is.

On a tabular model with a few tokens and a few positions all completions can be enumerated, so the expected gradient
and the variance of an estimator are finite sums: float64 rounding is the only error, and "unbiased" becomes a yes or
a no. The objectives themselves are computed from the same tables by other means, in `exact_gradient`.

Shapes, in addition to the legend of `lit_opd.types`: C contexts, that is the completions shorter than T from which a
next token is chosen, ordered by length and then as numbers in base V; B here runs over all completions; G is C * V, one
coordinate for every student logit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_opd.estimators.registry import BoundEstimator
from lit_opd.functional.divergences import reverse_kl
from lit_opd.types import TokenBatch

__all__ = ["TARGETS", "TabularPair", "Verdict", "declared_target", "exact_gradient", "expected_gradient", "pair_for",
           "second_moment", "trace_variance", "trajectory_gradients", "verify"]  # fmt: skip

TARGETS = ("sequence_reverse_kl", "reverse_kl", "forward_kl", "jsd")
_STOP = 0


@dataclass(frozen=True)
class TabularPair:
    """A student and a teacher that are nothing but tables of logits.

    Attributes:
        student_logits_CV: one row of logits for every context, float64.
        teacher_logits_CV: the teacher's, same shape.
        horizon: T, the longest completion.
        stop: whether token 0 ends a completion. It is itself counted, and what follows it is masked.
    """

    student_logits_CV: Tensor
    teacher_logits_CV: Tensor
    horizon: int
    stop: bool = False

    @classmethod
    def random(cls, vocabulary: int, horizon: int, seed: int, scale: float = 1.0, stop: bool = False) -> TabularPair:
        """Independent normal logits of standard deviation `scale`; there are `vocabulary` ** `horizon` completions."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, sum(_contexts(vocabulary, horizon)), vocabulary)
        student_logits_CV, teacher_logits_CV = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return cls(student_logits_CV, teacher_logits_CV, horizon, stop)

    def with_equal_models(self) -> TabularPair:
        """The same student, as its own teacher."""
        return replace(self, teacher_logits_CV=self.student_logits_CV)

    def completions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every completion once: ids [B, T], mask [B, T], and the context each token is chosen from [B, T]."""
        vocabulary = self.student_logits_CV.shape[1]
        ids_BT = torch.cartesian_prod(*[torch.arange(vocabulary)] * self.horizon).reshape(-1, self.horizon)
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        if self.stop:
            stopped_BT = ids_BT == _STOP
            mask_BT = stopped_BT.cumsum(1) - stopped_BT.long() == 0
            once_B = (mask_BT | stopped_BT).all(1)  # of all continuations of a stop token, keep one as padding
            ids_BT, mask_BT = ids_BT[once_B], mask_BT[once_B]
        contexts, first, number_B = [], 0, torch.zeros(len(ids_BT), dtype=torch.long)
        for position, of_this_length in enumerate(_contexts(vocabulary, self.horizon)):
            contexts.append(first + number_B)
            first, number_B = first + of_this_length, number_B * vocabulary + ids_BT[:, position]
        return ids_BT, mask_BT, torch.stack(contexts, dim=1)

    def reach(self, logps_CV: Tensor) -> Tensor:
        """Probability that a model with these log-probabilities comes through each context, [C]."""
        vocabulary = logps_CV.shape[1]
        goes_on_V = (torch.arange(vocabulary) != _STOP) if self.stop else torch.ones(vocabulary)
        steps = (logps_CV.exp() * goes_on_V).split(_contexts(vocabulary, self.horizon))
        levels = [torch.ones(1, dtype=logps_CV.dtype)]
        for step_cV in steps[:-1]:
            levels.append((levels[-1][:, None] * step_cV).flatten())
        return torch.cat(levels)


def _contexts(vocabulary: int, horizon: int) -> list[int]:
    """How many contexts there are of each length."""
    return [vocabulary**length for length in range(horizon)]


def exact_gradient(pair: TabularPair, target: str, teacher_weight: float = 0.5) -> Tensor:
    """Gradient of an objective with respect to the student's logits, from the tables and without any sample.

    Every target sums, over contexts, the probability to come there times a divergence of the next-token distributions.
    For `sequence_reverse_kl` the gradient also runs through that probability (chain rule of the KL); the others are
    local: the student's own prefixes are taken as given.

    Args:
        pair: the two models.
        target: one of `TARGETS`.
        teacher_weight: of the `jsd`, 0 to 1, with the convention of `functional.jsd`.

    Returns:
        [G] gradient.

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, found {target!r}")
    logits_CV = pair.student_logits_CV.clone().requires_grad_()
    student_logps_CV = logits_CV.log_softmax(-1)
    reach_C = pair.reach(student_logps_CV)
    if target != "sequence_reverse_kl":
        reach_C = reach_C.detach()
    local_C = _divergence(student_logps_CV, pair.teacher_logits_CV.log_softmax(-1), target, teacher_weight)
    return torch.autograd.grad((reach_C * local_C).sum(), logits_CV)[0].flatten()


def _divergence(student_logps_CV: Tensor, teacher_logps_CV: Tensor, target: str, teacher_weight: float) -> Tensor:
    # Not those of lit_opd.functional: an oracle that shares code with what it checks would share its mistakes.
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    w = {"forward_kl": 0.0, "jsd": teacher_weight}.get(target, 1.0)
    if w in (0.0, 1.0):
        return kl(student_logps_CV, teacher_logps_CV) if w else kl(teacher_logps_CV, student_logps_CV)
    mixture_logps_CV = (w * teacher_logps_CV.exp() + (1 - w) * student_logps_CV.exp()).log()
    return kl(teacher_logps_CV, mixture_logps_CV) / (1 - w) + kl(student_logps_CV, mixture_logps_CV) / w


def trajectory_gradients(pair: TabularPair, estimator: BoundEstimator) -> tuple[Tensor, Tensor]:
    """What every completion would contribute to the gradient, were it sampled: that of its sum of counted losses.

    A mix is evaluated term by term, as in training.

    Args:
        pair: the two models.
        estimator: must treat each row of its batch by itself, as the rows here are all completions, not a sample.

    Returns:
        Student probability of each completion [B], and its gradient [B, G].

    Raises:
        ValueError: the estimator's loss is not one value a position, or its support is larger than the vocabulary.
    """
    ids_BT, mask_BT, contexts_BT = pair.completions()
    # Every completion has its own copy of the table, so that one backward pass keeps their gradients apart.
    table_BCV = pair.student_logits_CV.repeat(len(ids_BT), 1, 1).requires_grad_()
    rows_B1 = torch.arange(len(ids_BT))[:, None]
    student_BTV = table_BCV.log_softmax(-1)[rows_B1, contexts_BT]
    teacher_BTV = pair.teacher_logits_CV.log_softmax(-1)[contexts_BT]
    total = 0.0 * table_BCV.sum()  # so that a loss without any gradient has the gradient zero
    for weight, term in estimator.terms:
        loss_BT = term(_token_batch(student_BTV, teacher_BTV, ids_BT, mask_BT, term)).loss_BT
        if loss_BT.shape != mask_BT.shape:
            raise ValueError(f"{term.spec.name} must return one loss a position, {tuple(mask_BT.shape)}, "
                             f"found {tuple(loss_BT.shape)}")  # fmt: skip
        total = total + weight * torch.where(mask_BT, loss_BT, 0.0).sum()
    (gradients_BCV,) = torch.autograd.grad(total, table_BCV)
    logps_BT = student_BTV.detach().gather(-1, ids_BT[..., None]).squeeze(-1)
    return torch.where(mask_BT, logps_BT, 0.0).sum(1).exp(), gradients_BCV.flatten(1)


def _token_batch(
    student_BTV: Tensor, teacher_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor, estimator: BoundEstimator
) -> TokenBatch:
    """Only what the estimator declares to need. Masked positions hold padding, not zeros: forgetting the mask shows."""
    student_BT, teacher_BT = (x.gather(-1, ids_BT[..., None]).squeeze(-1) for x in (student_BTV, teacher_BTV))
    tokens = TokenBatch(student_BT, teacher_BT, student_BT.detach(), mask_BT)
    needs, _, baseline = estimator.spec.needs.partition("+")
    if needs == "full":
        tokens = replace(tokens, student_full_logps_BTV=student_BTV, teacher_full_logps_BTV=teacher_BTV)
    if needs == "support":
        k, vocabulary = estimator.support_size, teacher_BTV.shape[-1]
        if k > vocabulary:
            raise ValueError(f"a support of {k} tokens does not fit into a vocabulary of {vocabulary}")
        teacher_BTK, support_BTK = teacher_BTV.topk(k, dim=-1)
        student_BTK = student_BTV.gather(-1, support_BTK)
        tokens = replace(tokens, support_ids_BTK=support_BTK, student_support_logps_BTK=student_BTK,
                         teacher_support_logps_BTK=teacher_BTK)  # fmt: skip
    return replace(tokens, kl_BT=reverse_kl(student_BTV.detach(), teacher_BTV)) if baseline else tokens


def expected_gradient(pair: TabularPair, estimator: BoundEstimator) -> Tensor:
    """Exact expectation, over completions of the student, of the gradient of the summed loss; [G]."""
    probs_B, gradients_BG = trajectory_gradients(pair, estimator)
    return probs_B @ gradients_BG


def second_moment(pair: TabularPair, estimator: BoundEstimator) -> float:
    """Expected squared norm of the gradient of one completion; zero only if every completion's gradient is."""
    probs_B, gradients_BG = trajectory_gradients(pair, estimator)
    return float(probs_B @ gradients_BG.square().sum(1))


def trace_variance(pair: TabularPair, estimator: BoundEstimator) -> float:
    """Trace of the covariance of the gradient of one completion."""
    probs_B, gradients_BG = trajectory_gradients(pair, estimator)
    return float(probs_B @ (gradients_BG - probs_B @ gradients_BG).square().sum(1))


class Verdict(NamedTuple):
    """What the oracle found; the first four are None where the estimator declares no target.

    Attributes:
        target: whose gradient it was compared with.
        relative_bias: norm of (expected gradient - target gradient), over that of the target.
        cosine: between the two.
        is_unbiased: `relative_bias` below 1e-10.
        trace_variance: of one completion's gradient.
        norm_at_equal: norm of the expected gradient where the student equals the teacher.
        rms_at_equal: root of the second moment there: zero only if no single completion has a gradient.
    """

    target: str | None
    relative_bias: float | None
    cosine: float | None
    is_unbiased: bool | None
    trace_variance: float
    norm_at_equal: float
    rms_at_equal: float


def declared_target(estimator: BoundEstimator) -> str | None:
    """The target an estimator declares; by convention a keyword `divergence` chooses it."""
    return estimator.kwargs.get("divergence", estimator.spec.target)


def pair_for(estimator: BoundEstimator, seed: int = 0) -> TabularPair:
    """Random models small enough to enumerate, with more tokens than the estimator's support."""
    sizes = [term.support_size for _, term in estimator.terms if term.spec.needs.startswith("support")]
    vocabulary = max([4, *(size + 2 for size in sizes)])
    horizon = 3 if vocabulary <= 6 else 2 if vocabulary <= 40 else 1
    return TabularPair.random(vocabulary, horizon, seed, stop=True)


def verify(estimator: BoundEstimator, pair: TabularPair | None = None, target: str | None = None) -> Verdict:
    """Compare an estimator's expected gradient with its target's; by default the declared one, on `pair_for` it."""
    pair, target = pair or pair_for(estimator), target or declared_target(estimator)
    equal = pair.with_equal_models()
    norm_at_equal = float(expected_gradient(equal, estimator).norm())
    spread = (trace_variance(pair, estimator), norm_at_equal, second_moment(equal, estimator) ** 0.5)
    if target is None:
        return Verdict(None, None, None, None, *spread)
    found = expected_gradient(pair, estimator)
    wanted = exact_gradient(pair, target, estimator.kwargs.get("teacher_weight", 0.5))
    bias = float((found - wanted).norm() / wanted.norm())
    return Verdict(target, bias, float(torch.cosine_similarity(found, wanted, dim=0)), bias < 1e-10, *spread)
