"""What any rollout engine offers; the local decode loop is one, a vLLM server another."""

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
    """Completes prompts and says under which law."""

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
            Completions with `sampler_logps_BT` under the law that really sampled them.
        """
        ...


def build_engine(config: RolloutConfig) -> RolloutEngine:
    """Make the configured engine; one of a user's own is called with the section. A server is first asked on sampling.

    Raises:
        UserError: no such class or function, or what it makes cannot sample.
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
