"""Find how long a row a model reads before its positions end, or begin to depend on the other rows of a batch.

Runs check prompts against it before weights load, and a model against every rollout that it is to write or score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_opd.errors import UserError

if TYPE_CHECKING:
    from lit_opd.models.language_model import LanguageModel

__all__ = ["check_length", "context_length", "steady_length"]


def context_length(config: Any) -> int | None:
    """Read how many tokens of a row are within a model's context, or None where its configuration does not say.

    >>> from transformers import LlamaConfig
    >>> rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    >>> context_length(LlamaConfig(max_position_embeddings=64, rope_parameters=rope))
    64
    """
    limits = (getattr(config, "max_position_embeddings", None), steady_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def steady_length(config: Any) -> int | None:
    """Find the longest row at which rotary frequencies do not depend on the length, or None where they never do.

    transformers chooses the frequencies of `longrope` and `dynamic` by the longest row of a batch. Beyond this length a
    row's log-probabilities depend on its neighbours, and keys that were cached earlier keep other frequencies.
    """
    text = getattr(config, "text_config", config)  # of a model that also sees or hears
    rope = getattr(text, "rope_parameters", None) or {}
    layers = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, Mapping)]
    whole = getattr(text, "max_position_embeddings", None)
    limits = [
        part.get("original_max_position_embeddings", whole) for part in layers if part.get("rope_type") == "longrope"
    ]
    limits += [whole for part in layers if part.get("rope_type") == "dynamic" and not part.get("alpha")]
    return min((limit for limit in limits if limit is not None), default=None)


def check_length(model: LanguageModel, tokens: int) -> None:
    """Refuse rows, prompt and completion, so long that the model's rotary frequencies depend on the longest of a batch.

    Raises:
        UserError: naming the longest row for which they do not.
    """
    if model.steady_length is not None and tokens > model.steady_length:
        expected = f"prompt and completion of at most {model.steady_length} tokens, for in longer rows the rotary "
        expected += f"frequencies of {model.key}.path depend on the longest row of a batch"
        remedy = "Lower it or data.max_prompt_tokens, or name a model whose rope_type is static (yarn, llama3)."
        raise UserError("rollout.max_new_tokens", expected, f"rows of up to {tokens}", remedy)
