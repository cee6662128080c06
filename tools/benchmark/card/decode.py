"""Decoding: milliseconds of one token of every row, against the time of reading weights and cache once.

The time of a long rollout minus that of a short one, by the tokens between, leaves out prompts and preparation.
"""

from __future__ import annotations

from typing import Any

import torch

from lit_opd.config import RolloutConfig
from lit_opd.models import LanguageModel
from lit_opd.rollout import build_engine, uniforms
from lit_opd.types import SamplingLaw
from tools.benchmark.card.sizes import Shape, device_of, make_batch, make_model, make_tokenizer, seconds, sizes_of
from tools.benchmark.processes import answer
from tools.benchmark.roofline import Geometry

BYTES = 256 * 2**20


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time every number of rows."""
    sizes, device = sizes_of(job), device_of(job)
    model = make_model(sizes.student, sizes.vocabulary, device, torch.bfloat16)
    policy = LanguageModel(model, make_tokenizer(sizes.vocabulary), "student")
    read = read_rate(device)
    short, long = sizes.new // 4, sizes.new
    found = []
    for rows in sizes.rows:
        engine, law = build_engine(RolloutConfig()), SamplingLaw(min_new_tokens=sizes.new)
        engine.prove(policy, rows, sizes.prompt + sizes.new, job["paths"])
        batch = make_batch(sizes, rows, device)

        def sample(length: int, batch: Any = batch, engine: Any = engine, law: SamplingLaw = law) -> None:
            numbers_BT = uniforms((0, 0), batch.draws, 1, length).to(device)
            engine.sample(policy, batch, law, 1, numbers_BT)

        taken = [seconds(lambda length=length: sample(length), device, tries=3) for length in (short, long)]
        step = (taken[1] - taken[0]) / (long - short)
        limit = limit_seconds(sizes.student, sizes.vocabulary, rows, sizes.prompt + (short + long) / 2, read)
        found.append({"rows": rows, "ms": 1e3 * step, "limit_ms": 1e3 * limit, "rollout_s": taken[1]})
    return {"rows": found, "read_bytes_per_s": read}


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
