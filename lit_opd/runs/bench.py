"""Put a step together without training it: models on their device, in the precision of a run.

The experiments of `lab` call it: `measure` and `audit` take the step apart that `train` would make.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.distiller import Distiller
from lit_opd.module import DistillationModule
from lit_opd.runs.lightning_trainer import build_evaluation_trainer

__all__ = ["Bench", "set_up"]


class Bench(NamedTuple):
    """A step that is ready to be made.

    Attributes:
        module: holds the models.
        distiller: the module's step.
        arithmetic: opens the precision that a training step runs in.
    """

    module: DistillationModule
    distiller: Distiller
    arithmetic: Callable[[], AbstractContextManager[Any]]


def set_up(config: Config, data: PromptDataModule) -> Bench:
    """Load the models of a run and assemble its step, with the weights that training would begin from.

    Raises:
        UserError: whatever cannot work and has not shown in the data.
    """
    trainer = build_evaluation_trainer(config)
    module = DistillationModule.from_config(config)
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    return Bench(module, module.assemble(data.verifier), trainer.precision_plugin.forward_context)
