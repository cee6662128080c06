"""Define what a rollout engine is, and make the configured one.

Engines are the decode loop of this process, a vLLM server, and classes of a user's own. Training and evaluations sample
with the engine that `rollout.engine` names.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lit_opd.config import RolloutConfig
from lit_opd.errors import UserError
from lit_opd.models import LanguageModel
from lit_opd.plugins import call_object
from lit_opd.rollout.local import LocalEngine
from lit_opd.rollout.vllm import VllmEngine
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["RolloutEngine", "build_engine"]


class RolloutEngine(Protocol):
    """A sampler of completions that says under which law it sampled."""

    def sample(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        """Complete every prompt `num_completions` times.

        Args:
            policy: the model whose completions are wanted, with its present weights.
            batch: prompts.
            law: temperature and truncation.
            num_completions: completions a prompt; row i of the result completes prompt i // num_completions.
            uniforms_BT: [B, T] float64 in [0, 1): the randomness of every row and position, and the longest length T.
                An engine with a random generator of its own may use them as seeds only.

        Returns:
            Completions with `sampler_logps_BT` under the law that sampled them.
        """
        ...


def build_engine(config: RolloutConfig) -> RolloutEngine:
    """Make the configured engine, calling a user's own class or function with the section.

    No server is asked before the first sampling.

    Raises:
        UserError: no such class or function, or the object it makes cannot sample.
    """
    if config.engine == "local":
        return LocalEngine()
    if config.engine == "vllm":
        return VllmEngine(config.server or "")
    engine = call_object("rollout.engine", config.engine, config)
    if not callable(getattr(engine, "sample", None)):
        expected = f"{config.engine} to make an object with a method `sample`"
        raise UserError("rollout.engine", expected, type(engine).__name__, "See RolloutEngine in lit_opd.rollout.")
    return engine
