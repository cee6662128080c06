"""Do everything of a run but its first step, and write nothing: `fit --dry-run`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lit_opd.config import Config
from lit_opd.config.limits import as_type
from lit_opd.runs import torch_settings
from lit_opd.runs.assembly import Assembly, assemble
from lit_opd.runs.outcome import Outcome
from lit_opd.types import PromptBatch

__all__ = ["Rehearsal", "rehearse"]


class Rehearsal(NamedTuple):
    """A run that could begin, and the batch that it would begin with, on its device."""

    made: Assembly
    batch: PromptBatch


def rehearse(config: Config, resume: str | None = None) -> Rehearsal | Outcome:
    """Put a run together with all its weights on their device, and prove its fast paths on the first batch.

    Raises:
        UserError: whatever cannot work.
    """
    as_type("config", config, Config)
    with torch_settings.settled(config):
        made = assemble(config, resume)
        if isinstance(made, Outcome):
            return made
        trainer, module = made.trainer, made.module
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        module.trainer = trainer
        module.distiller = module.assemble(made.data.verifier)
        batch = made.data.transfer_batch_to_device(next(iter(made.data.train_dataloader())), module.device, 0)
        with torch.enable_grad():
            module.prove_models(batch)
        return Rehearsal(made, batch)
