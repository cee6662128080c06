"""What any rollout engine offers; the local decode loop is one, a vLLM server another."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lit_opd.config import RolloutConfig
from lit_opd.models import LanguageModel
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
    """The configured engine; a server is first asked when something is sampled."""
    return LocalEngine() if config.engine == "local" else VllmEngine(config.server or "")
