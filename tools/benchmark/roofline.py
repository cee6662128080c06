"""The least time a step can take on a machine: what has to be multiplied and moved, at the rates it was measured at.

Counted are the products of matrices and the bytes of weights, gradients, optimizer state and key-value cache; whatever
is elementwise (norms, softmax, sampling, the divergence) is free, as are Python and the operating system. A phase takes
as long as the slower of its products and its bytes, and phases follow one another. With W the weights of a body's
products, V x H the head, B rows, P prompt tokens and T new tokens of a row, C completions of a prompt, and attention at
4 x layers x heads x head size x context FLOPs a token (half of that on average, as it is causal):

- rollout: P x B / C tokens through the student's body at 2W FLOPs each, B heads at 2VH; then T - 1 steps of B tokens
  through body and head, each step reading these weights in bf16 and the keys and values so far; before it all, the
  fp32 masters are cast once (4 bytes read, 2 written, a weight).
- teacher: P x B / C + (T - 1) x B tokens through the teacher's body: completions of a prompt can share it.
- student: the same through the student's, three times: forward, and both gradients.
- head: B x T positions, 2VH FLOPs each for the student's logits, the teacher's, and the gradients by hidden state and
  by weight of the student's head, each at the rate of its own shape; the last is written in fp32.
- optimizer: 32 bytes a parameter: the gradient is read for its norm (4), then gradient, parameter and both moments are
  read (16), the latter three written (12).

The least memory is fp32 parameters, gradients and two moments of the student, and the teacher in bf16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

BF16, FP32 = 2, 4
OPTIMIZER_BYTES = 32


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model of the Llama kind with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def body_weights(self) -> int:
        """Weights of the products in the body."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, norms included."""
        return self.body_weights + self.head_weights + (2 * self.layers + 1) * self.hidden

    def body_flops(self, tokens: float, context: float) -> float:
        """Of a forward pass over tokens which each attend to so many, on average."""
        return tokens * (2 * self.body_weights + 4 * self.layers * self.heads * self.head_size * context)

    def step_flops(self, step: Step) -> float:
        """Of a forward pass over all prompts and completions but their last tokens."""
        completions = self.body_flops(step.rows * (step.new - 1), step.prompt + step.new / 2)
        return self.body_flops(step.prompt_tokens, step.prompt / 2) + completions

    def cache_bytes(self, tokens: float) -> float:
        """Keys and values of so many tokens, bf16."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_size * BF16


class Step(NamedTuple):
    """What one step works on: rows, the completions of a prompt among them, tokens of prompt and of completion."""

    rows: float
    completions: int
    prompt: float
    new: float

    @property
    def prompt_tokens(self) -> float:
        """Tokens of all prompts, each once."""
        return self.rows / self.completions * self.prompt


def read_geometry(folder: Path) -> Geometry:
    """The sizes of a saved model."""
    config = json.loads((folder / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Geometry(*(config[name] for name in names), head_size, config["vocab_size"])


def shapes(student: Geometry, step: Step) -> dict[str, tuple[int, int, int]]:
    """The products whose rates `limit` asks for, [rows, inner, columns]."""
    positions, tokens = round(step.rows * step.new), round(step.rows * (step.prompt + step.new))
    return {
        "body": (tokens, student.hidden, student.intermediate),
        "logits": (positions, student.hidden, student.vocabulary),
        "hidden_gradient": (positions, student.vocabulary, student.hidden),
        "weight_gradient": (student.vocabulary, positions, student.hidden),
        "decode": (round(step.rows), student.hidden, student.intermediate),
    }


@dataclass(frozen=True)
class Limit:
    """The least time of a step; see above.

    Attributes:
        student: what learns.
        teacher: what it learns from.
        rates: by `rates.measure`.
    """

    student: Geometry
    teacher: Geometry
    rates: dict[str, Any]

    def seconds(self, step: Step) -> dict[str, float]:
        """Seconds of every phase, and their sum `step_s`."""
        body, copy = self.rates["bf16"]["body"], self.rates["copy"]
        cast = self.student.parameters * (FP32 + BF16) / copy
        seconds = {
            "rollout_s": cast + self.prefill(step) + self.decode(step),
            "teacher_s": self.teacher.step_flops(step) / body,
            "student_s": 3 * self.student.step_flops(step) / body,
            "head_s": self.head(step.rows * step.new),
            "optimizer_s": self.student.parameters * OPTIMIZER_BYTES / copy,
        }
        return seconds | {"step_s": sum(seconds.values())}

    def prefill(self, step: Step) -> float:
        """Seconds of the prompts, each once, and of every row's first logits."""
        flops = self.student.body_flops(step.prompt_tokens, step.prompt / 2)
        return (flops + 2 * step.rows * self.student.head_weights) / self.rates["bf16"]["body"]

    def decode(self, step: Step) -> float:
        """Seconds of all tokens after the first, each bound by its products or by reading weights and cache."""
        context = step.prompt + step.new / 2
        flops = self.student.body_flops(step.rows, context) + 2 * step.rows * self.student.head_weights
        weights = BF16 * (self.student.body_weights + self.student.head_weights)
        moved = weights + self.student.cache_bytes(step.prompt_tokens + step.rows * step.new / 2)
        return (step.new - 1) * max(flops / self.rates["bf16"]["body"], moved / self.rates["read"])

    def head(self, positions: float) -> float:
        """Seconds of two projections and two gradients."""
        products, flops = self.rates["bf16"], 2 * positions * self.student.head_weights
        logits = (flops + 2 * positions * self.teacher.head_weights) / products["logits"]
        written = FP32 * self.student.head_weights / self.rates["copy"]
        return logits + flops / products["hidden_gradient"] + max(flops / products["weight_gradient"], written)


def least_mb(student: Geometry, teacher: Geometry) -> float:
    """Weights, gradients and optimizer state, MB."""
    return (student.parameters * 4 * FP32 + teacher.parameters * BF16) / 1e6
