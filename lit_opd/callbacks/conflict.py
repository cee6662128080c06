"""Log how much of the gradient comes from each of several teachers, and whether they pull in the same direction.

Why here: a micro-batch is of the same teachers, and what flows back from it is seen on its way. It costs a sketch of
every gradient in the steps that are looked at, and a byte for every weight that trains.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_opd.callbacks.pace import is_due
from lit_opd.errors import LintWarning
from lit_opd.functional import upcast
from lit_opd.measures.ledger import gradient_report
from lit_opd.measures.sketch import Sketch
from lit_opd.module import DistillationModule
from lit_opd.tracking import log_metrics

__all__ = ["TeacherGradients"]

SIZE = 65536  # two gradients that have nothing in common have a cosine of 0 give or take sqrt(1 / SIZE), .004


class TeacherGradients(L.Callback):
    """Logs `gradient_report` of the last update of a step.

    Args:
        every_n_steps: optimizer steps between two looks.
        size: dimensions that are kept of a longer gradient.
    """

    def __init__(self, every_n_steps: int, size: int = SIZE) -> None:
        self.every_n_steps, self.size = every_n_steps, size
        self._sketch: Sketch | None = None
        self._looks = False
        self._hooks: list[Any] = []
        # Of every micro-batch of an update: its part of the gradient, and which teachers it is of.
        self._parts: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:  # type: ignore[override]
        """Draw the signs of the sketch, unless weights are sharded: their gradients are never whole."""
        parameters = self._trained(pl_module)
        if any(isinstance(p, DTensor) for p in parameters):
            left_out = "teacher/*/gradient_share and gradient_cosine/*: left out with sharded weights."
            warnings.warn(left_out, LintWarning, stacklevel=2)
            return
        self._sketch = Sketch(parameters, self.size, seed=0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: DistillationModule, *_: Any) -> None:  # type: ignore[override]
        """Find out whether this step is one to look at."""
        after = pl_module.global_step + pl_module.optim_config.updates_per_rollout
        self._looks = self._sketch is not None and is_due(pl_module, after, self.every_n_steps)

    def on_before_backward(self, trainer: L.Trainer, pl_module: DistillationModule, loss: Tensor) -> None:  # type: ignore[override]
        """Have the gradients of this micro-batch sketched before they are added to others and other processes'."""
        if not self._looks:
            return
        assert self._sketch is not None
        if len(pl_module.seen) == 1:
            self._parts = []
        parameters, (rollout, _) = self._trained(pl_module), pl_module.seen[-1]
        total = upcast(parameters[0].flatten()[:0]).new_zeros(self._sketch.size)
        for number, parameter in enumerate(parameters):
            self._hooks.append(parameter.register_hook(partial(self._sketch.add, total, number)))
        assert rollout.routes_BM is not None
        self._parts.append((total, (rollout.routes_BM > 0).any(0)))

    def on_after_backward(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:  # type: ignore[override]
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DistillationModule, *_: Any) -> None:  # type: ignore[override]
        """Put the parts of all processes together, and log what they tell."""
        if not self._looks:
            return
        gradients_GD, taught_GM = (torch.stack(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        if trainer.world_size > 1:
            gradients_GD = torch.cat(gather_all_tensors(gradients_GD))
            taught_GM = torch.cat(gather_all_tensors(taught_GM.int())) > 0
        log_metrics(trainer, gradient_report(gradients_GD, taught_GM, pl_module.teachers), pl_module.global_step)

    @staticmethod
    def _trained(module: DistillationModule) -> list[Tensor]:
        return [p for p in module.model.parameters() if p.requires_grad]
