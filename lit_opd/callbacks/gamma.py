"""Choose the discount of an estimator from measured bias and variance.

Why here: the best discount changes along a run. `estimator.adapt_gamma_every` gives a trainer of `fit` the callback.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.functional.tradeoff import squared_bias_and_variance
from lit_opd.module import DistillationModule
from lit_opd.objective.credit import credit_sketches
from lit_opd.types import PromptBatch

__all__ = ["ChooseGamma", "check_gamma"]

GAMMAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_DECAY = 0.8
_STATE = ("squared_bias", "variance", "chosen", "next_at")


def check_gamma(estimator: BoundEstimator) -> None:
    """Check that the discount of an estimator can be chosen.

    Raises:
        UserError: it has no keyword `gamma`, or is not unbiased at 1: then bias could not be measured.
    """
    key = "estimator.adapt_gamma_every"
    if "gamma" not in estimator.keywords or any(term.is_local for term in estimator.terms):
        raise UserError(key, "an estimator with a keyword gamma", estimator.spec.name, "Choose `hybrid`, or set null.")
    if not _with_gamma(estimator, 1.0).contract.unbiased:
        expected = "an estimator that is unbiased at gamma = 1, against which bias is measured"
        raise UserError(key, expected, estimator.spec.name, "Choose `hybrid`, or set null.")


class ChooseGamma(L.Callback):
    """Sets the estimator's `gamma` to the one of least mean squared error, judged on the coming rollout.

    Every `every_n_steps` optimizer steps the rollout of the next step is sampled one time more; the gradients of the
    output layer that its prompts would give under each discount are compared. Their squared bias against gamma = 1 and
    their variance are both estimated without bias, averaged over the last few times, and added: what is smallest
    together is chosen. The completions of the step itself do not depend on it.

    Args:
        every_n_steps: optimizer steps between two choices.
        gammas: discounts to choose from; the last must be 1.
    """

    def __init__(self, every_n_steps: int, gammas: tuple[float, ...] = GAMMAS) -> None:
        self.every_n_steps, self.gammas = every_n_steps, gammas
        self.squared_bias = self.variance = torch.zeros(len(gammas), dtype=torch.float64)
        self.chosen: float | None = None
        self.next_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:  # type: ignore[override]
        """Take up the discount of the run that is resumed."""
        check_gamma(pl_module.estimator)
        if self.chosen is not None:
            _use(pl_module, self.chosen)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: DistillationModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Choose anew where it is time."""
        if pl_module.global_step < self.next_at:
            return
        self.next_at = pl_module.global_step + self.every_n_steps
        candidates = [_with_gamma(pl_module.estimator, gamma) for gamma in self.gammas]
        with trainer.precision_plugin.train_step_context():  # Lightning opens it for the step alone
            gradients_MPF = _prompt_gradients(pl_module, batch, candidates)
        bias_M, variance_M = squared_bias_and_variance(gradients_MPF, unbiased=len(self.gammas) - 1)
        world = trainer.world_size
        # Each process estimates the bias of the same thing, and the variance of a mean over its own part.
        self.squared_bias = _DECAY * self.squared_bias + _over_processes(pl_module, bias_M) / world
        self.variance = _DECAY * self.variance + _over_processes(pl_module, variance_M) / world**2
        error_M = self.squared_bias.clamp(min=0) + self.variance
        self.chosen = self.gammas[int(error_M.argmin())]
        _use(pl_module, self.chosen)
        pl_module.log_dict(pl_module.at_step({"train/gamma": self.chosen}), batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Give a checkpoint what was measured so far, and the choice."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in _STATE:
            setattr(self, name, state_dict[name])


def _use(module: DistillationModule, gamma: float) -> None:
    module.estimator = _with_gamma(module.estimator, gamma)
    module.distiller = module.distiller.with_estimator(module.estimator)


def _with_gamma(estimator: BoundEstimator, gamma: float) -> BoundEstimator:
    return estimators.build(estimator.spec.name, **{**estimator.kwargs, "gamma": gamma})


@torch.no_grad()
def _prompt_gradients(module: DistillationModule, batch: PromptBatch, candidates: list[BoundEstimator]) -> Tensor:
    """Sketch the gradient of every prompt of a batch, [M, prompts, F], so scaled that the step's is their mean.

    By prompt and not by completion, because estimators may compare the completions of a prompt with each other.
    """
    distiller, prompts = module.distiller, len(batch.rows)
    rollout = distiller.sample(batch)
    tokens, sequences = rollout.mask_BT.sum(), rollout.mask_BT.any(1).sum()
    pieces, owners = [], []
    for micro in distiller.score(rollout):
        weights_BT = distiller.weights(micro.rollout.mask_BT, tokens.float(), sequences.float())
        pieces.append(credit_sketches(module.student, micro, candidates, weights_BT * prompts, distiller.head_rows))
        owners.append(micro.rollout.prompt_index_B)
    gradients_MBF = torch.cat(pieces, dim=1)
    blank_MPF = gradients_MBF.new_zeros(len(candidates), prompts, gradients_MBF.shape[-1])
    return blank_MPF.index_add(1, torch.cat(owners), gradients_MBF)


def _over_processes(module: DistillationModule, values_M: Tensor) -> Tensor:
    total = module.total({str(i): value for i, value in enumerate(values_M)})
    return torch.tensor(list(total.values()), dtype=torch.float64)
