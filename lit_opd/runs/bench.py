"""Put a step together without training it: models on their device, in the precision of a run.

The experiments of `lab` call it: `measure` and `audit` take the step apart that `train` would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.module import DistillationModule
from lit_opd.runs.lightning_trainer import build_evaluation_trainer
from lit_opd.runs.torch_settings import settled

__all__ = ["set_up"]


def set_up(
    config: Config, data: PromptDataModule
) -> tuple[DistillationModule, Callable[[], AbstractContextManager[Any]]]:
    """Load the models of a run and assemble its step, with the weights that training would begin from.

    Returns:
        The module with its `distiller`, and what opens the precision that a training step runs in.
    """
    trainer = build_evaluation_trainer(config)
    module = DistillationModule.from_config(config)
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    module.distiller = module.assemble(data.verifier)

    @contextmanager
    def precision() -> Iterator[None]:
        with settled(config), trainer.precision_plugin.forward_context():
            yield

    return module, precision
