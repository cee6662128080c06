"""Models small enough to write down every completion they can produce.

Shapes, in addition to the legend of `lit_opd.types`: C contexts, that is the completions shorter than T from which a
next token is chosen, ordered by length and then as numbers in base V; B here runs over all completions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.estimators.contract import BoundEstimator
from lit_opd.types import Need

__all__ = ["TabularPair", "pair_for"]

_STOP = 0


@dataclass(frozen=True)
class TabularPair:
    """A student and a teacher that are nothing but tables of logits.

    Attributes:
        student_logits_CV: one row of logits for every context, float64.
        teacher_logits_CV: the teacher's, same shape.
        horizon: T, the longest completion.
        stop: whether token 0 ends a completion. It is itself counted, and what follows it is masked.
        sampler_logits_CV: of the law that writes the completions; None where it is the student's own.
        seed: of what else there is: a reference model, and the reward of every completion.
    """

    student_logits_CV: Tensor
    teacher_logits_CV: Tensor
    horizon: int
    stop: bool = False
    sampler_logits_CV: Tensor | None = None
    seed: int = 0

    @classmethod
    def random(cls, vocabulary: int, horizon: int, seed: int, scale: float = 1.0, stop: bool = False) -> TabularPair:
        """Draw independent normal logits of standard deviation `scale`, for `vocabulary` ** `horizon` completions."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, sum(_contexts(vocabulary, horizon)), vocabulary)
        student_logits_CV, teacher_logits_CV = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return cls(student_logits_CV, teacher_logits_CV, horizon, stop, seed=seed)

    def with_equal_models(self) -> TabularPair:
        """Make the student its own teacher."""
        return replace(self, teacher_logits_CV=self.student_logits_CV)

    def with_sampler(self, shift: float, seed: int = 0) -> TabularPair:
        """Let completions be written by a student of `shift` normal steps ago."""
        noise = torch.randn(self.student_logits_CV.shape, generator=_generator(self.seed, seed), dtype=torch.float64)
        return replace(self, sampler_logits_CV=self.student_logits_CV + shift * noise)

    @property
    def law_logps_CV(self) -> Tensor:
        """Log-probabilities of what writes the completions."""
        logits = self.student_logits_CV if self.sampler_logits_CV is None else self.sampler_logits_CV
        return logits.log_softmax(-1)

    @property
    def reference_logits_CV(self) -> Tensor:
        """A third model."""
        shape = self.student_logits_CV.shape
        return torch.randn(shape, generator=_generator(self.seed, 1), dtype=torch.float64)

    def rewards(self) -> Tensor:
        """Draw the reward, 0 or 1, of each of the `completions`."""
        draws = torch.rand(len(self.completions()[0]), generator=_generator(self.seed, 2), dtype=torch.float64)
        return (draws > 0.5).double()

    def completions(self) -> tuple[Tensor, Tensor, Tensor]:
        """List every completion once: ids [B, T], mask [B, T], and the context each token is chosen from [B, T]."""
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
        """Compute the probability that a model with these log-probabilities comes through each context, [C]."""
        vocabulary = logps_CV.shape[1]
        goes_on_V = (torch.arange(vocabulary) != _STOP) if self.stop else torch.ones(vocabulary)
        steps = (logps_CV.exp() * goes_on_V).split(_contexts(vocabulary, self.horizon))
        levels = [torch.ones(1, dtype=logps_CV.dtype)]
        for step_cV in steps[:-1]:
            levels.append((levels[-1][:, None] * step_cV).flatten())
        return torch.cat(levels)


def pair_for(estimator: BoundEstimator, seed: int = 0, horizon: int | None = None, stop: bool = True) -> TabularPair:
    """Make random models of a size that can be written down, with more tokens than the estimator's support."""
    vocabulary = max(4, *(term.estimator.support_size + 2 for term in estimator.terms))
    longest = 3 if vocabulary <= 6 else 2 if vocabulary <= 40 else 1
    if Need.GROUPS in estimator.needs and vocabulary > 5:
        longest = 1  # what compares the completions of a prompt is evaluated on pairs of them
    return TabularPair.random(vocabulary, min(horizon or longest, longest), seed, stop=stop)


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + 7 + stream)


def _contexts(vocabulary: int, horizon: int) -> list[int]:
    """Count the contexts of each length."""
    return [vocabulary**length for length in range(horizon)]
