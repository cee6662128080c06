"""Build optimizers and schedulers by name, and keep small steps of weights in bfloat16 from being lost.

`DistillationModule` builds them, `runs.prepare` rehearses a step with them.
"""

from lit_opd.optim.building import (
    NonFiniteStepError,
    build_optimizer,
    build_scheduler,
    play_schedule,
    rehearsal_device,
)
from lit_opd.optim.rounding import StochasticAdamW

__all__ = [
    "NonFiniteStepError",
    "StochasticAdamW",
    "build_optimizer",
    "build_scheduler",
    "play_schedule",
    "rehearsal_device",
]
