"""Build optimizers and schedulers by name, and keep small steps of weights in bfloat16 from being lost.

`DistillationModule` builds them, `runs.prepare` rehearses a step with them.
"""

from lit_opd.optim.building import (
    MUON,
    NonFiniteStepError,
    build_optimizer,
    build_scheduler,
    play_schedule,
    rehearsal_device,
)
from lit_opd.optim.muon import MuonWithAdamW, outer_matrices
from lit_opd.optim.rounding import StochasticAdamW

__all__ = [
    "MUON",
    "MuonWithAdamW",
    "NonFiniteStepError",
    "StochasticAdamW",
    "build_optimizer",
    "build_scheduler",
    "outer_matrices",
    "play_schedule",
    "rehearsal_device",
]
