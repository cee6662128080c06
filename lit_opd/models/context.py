"""Find how long a row a model reads before its positions end, or begin to depend on the other rows of a batch.

Runs check prompts against it before weights load, and a model against every rollout that it is to write or score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["context_length", "steady_length"]


def context_length(config: Any) -> int | None:
    """Read how many tokens of a row are within a model's context; None where its configuration does not say.

    >>> from transformers import LlamaConfig
    >>> rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    >>> context_length(LlamaConfig(max_position_embeddings=64, rope_parameters=rope))
    64
    """
    limits = (getattr(config, "max_position_embeddings", None), steady_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def steady_length(config: Any) -> int | None:
    """Find the longest row at which rotary frequencies do not depend on the length; None where they never do.

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
