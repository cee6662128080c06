"""Log numbers of a training step that tell why it goes well or badly.

Why here: they cost a look at every token, so not every step pays for them. `diagnostics.every_n_steps` says how often.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_opd.callbacks.pace import is_due
from lit_opd.measures.steps import gradient_noise, observed_tokens, token_numbers
from lit_opd.module import DistillationModule
from lit_opd.tracking import log_metrics

__all__ = ["StepDiagnostics"]


class StepDiagnostics(L.Callback):
    """Logs how advantages are spread, what positions, support, sampler and stop tokens look like, and gradient noise.

    Everything is read from values that the step left behind: see `lit_opd.measures.steps`. The share of steps whose
    gradient was clipped is of all optimizer steps since the last look.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._clipped: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DistillationModule, *_: Any) -> None:  # type: ignore[override]
        """Look where it is time."""
        limit = pl_module.optim_config.clip_norm
        if limit is not None:
            self._clipped.append(float(trainer.callback_metrics["train/grad_norm"]) > limit)
        if not is_due(pl_module, pl_module.global_step, self.every_n_steps):
            return
        own = observed_tokens(pl_module.seen, pl_module.rollout_config.max_new_tokens)
        if trainer.world_size > 1:
            gathered = torch.cat(gather_all_tensors(torch.stack(list(own.values()), dim=1)))
            own = dict(zip(own, gathered.unbind(1), strict=True))
        numbers = token_numbers(own) | self._gradient(pl_module)
        log_metrics(trainer, numbers, pl_module.global_step)

    def _gradient(self, module: DistillationModule) -> dict[str, float]:
        numbers = {"gradient/clipped_frac": sum(self._clipped) / len(self._clipped)} if self._clipped else {}
        self._clipped = []
        found = gradient_noise(module.optimizers().optimizer)  # type: ignore[union-attr]
        if found is None:
            return numbers
        (signal, noise), sequences = found, sum(rollout.mask_BT.any(1).sum() for rollout, _ in module.seen)
        if noise > 0:
            numbers["gradient/signal_to_noise"] = signal / noise
        if noise > 0 and signal > 0:  # else the signal cannot be told from zero, and the scale has no value
            numbers["gradient/noise_scale"] = noise / signal * module.total({"sequences": sequences})["sequences"]
        return numbers
