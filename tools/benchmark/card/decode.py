"""Decoding: milliseconds of one token of every row, against the time of reading weights and cache once.

The time of a long rollout minus that of a short one, by the tokens between, leaves out prompts and preparation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lit_opd.config import RolloutConfig
from lit_opd.models import LanguageModel
from lit_opd.rollout import build_engine, uniforms
from lit_opd.types import SamplingLaw
from tools.benchmark.card.sizes import (
    Shape,
    Sizes,
    device_of,
    make_batch,
    make_hybrid,
    make_model,
    make_tokenizer,
    seconds,
    sizes_of,
)
from tools.benchmark.processes import answer
from tools.benchmark.roofline import Geometry

BYTES = 256 * 2**20


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time every number of rows, and the most rows of a hybrid, whose limit is not known."""
    sizes, device = sizes_of(job), device_of(job)
    read, found = read_rate(device), []
    cases = [("dense", make_model, sizes.rows)]
    cases += [] if job["quick"] else [("hybrid", make_hybrid, sizes.rows[-1:])]
    for kind, make, numbers in cases:
        model = make(sizes.student, sizes.vocabulary, device, torch.bfloat16)
        policy = LanguageModel(model, make_tokenizer(sizes.vocabulary), "student")
        for rows in numbers:
            row = {"model": kind, "rows": rows} | decoded(policy, sizes, rows, device, job["paths"])
            if kind == "dense":
                context = sizes.prompt + 5 * sizes.new / 8
                row["limit_ms"] = 1e3 * limit_seconds(sizes.student, sizes.vocabulary, rows, context, read)
            found.append(row)
    return {"rows": found, "read_bytes_per_s": read}


def decoded(policy: LanguageModel, sizes: Sizes, rows: int, device: torch.device, paths: str) -> dict[str, float]:
    """Time rollouts of so many rows, long and a quarter as long."""
    engine, law = build_engine(RolloutConfig()), SamplingLaw(min_new_tokens=sizes.new)
    engine.prove(policy, rows, sizes.prompt + sizes.new, paths)
    batch = make_batch(sizes, rows, device)

    def sample(length: int) -> None:
        engine.sample(policy, batch, law, 1, uniforms((0, 0), batch.draws, 1, length).to(device))

    short, long = (seconds(partial(sample, length), device, tries=3) for length in (sizes.new // 4, sizes.new))
    return {"ms": 1e3 * (long - short) / (sizes.new - sizes.new // 4), "rollout_s": long}


def read_rate(device: torch.device) -> float:
    """Bytes a second at which the device reads."""
    source = torch.ones(BYTES // 4, device=device)
    return source.nbytes / seconds(source.sum, device)


def limit_seconds(shape: Shape, vocabulary: int, rows: int, context: float, read: float) -> float:
    """The time of reading bf16 weights and the rows' keys and values once."""
    geometry = Geometry(
        shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size, shape.num_attention_heads,
        shape.num_key_value_heads, shape.head_dim, vocabulary,
    )  # fmt: skip
    weights = 2 * (geometry.body_weights + geometry.head_weights)
    return (weights + geometry.cache_bytes(rows * context)) / read


if __name__ == "__main__":
    answer(measure)
