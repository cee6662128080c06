"""Define what a rollout engine is, and make the configured one.

Engines are the decode loop of this process, a vLLM server, and classes of a user's own. Training and evaluations sample
with the engine that `rollout.engine` names.
"""

from __future__ import annotations

from typing import Any, Protocol

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
    """A sampler of completions that says under which law it sampled.

    One that also has a method `prove`, as `LocalEngine.prove`, is asked for its fast paths before the first rollout.
    """

    def sample(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        """Complete every prompt `num_completions` times.

        Args:
            policy: the model whose completions are wanted, with its present weights.
            batch: prompts. An engine may call its `ended` with each completion that ends before the others.
            law: temperature and truncation.
            num_completions: completions a prompt; row i of the result completes prompt i // num_completions.
            uniforms_BT: [B, T] float64 in [0, 1): the randomness of every row and position, and the longest length T.
                An engine with a random generator of its own may use them as seeds only.

        Returns:
            Completions with `sampler_logps_BT` under the law that sampled them.
        """
        ...


def build_engine(config: RolloutConfig, given: RolloutEngine | None = None) -> RolloutEngine:
    """Make the configured engine, calling a user's own class or function with the section, or take the given one.

    No server is asked before the first sampling.

    Raises:
        UserError: no such class or function, or the object it makes cannot sample.
    """
    if given is not None:
        return _checked(given, "one")
    if config.engine == "local":
        return LocalEngine(config.capture)
    if config.engine == "vllm":
        return VllmEngine(config.server or "")
    return _checked(call_object("rollout.engine", config.engine, config), f"{config.engine} to make one")


def _checked(engine: Any, expected: str) -> RolloutEngine:
    if not callable(getattr(engine, "sample", None)):
        remedy = "See RolloutEngine in lit_opd.rollout."
        raise UserError("rollout.engine", f"{expected} with a method `sample`", type(engine).__name__, remedy)
    return engine
