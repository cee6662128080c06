"""What a finished run of a comparison leaves behind, and what statistics are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Point", "RunResult"]


@dataclass(frozen=True)
class Point:
    """A place on a learning curve.

    Attributes:
        step: optimizer steps done.
        tokens: completion tokens sampled for training so far.
        seconds: spent in training steps so far, evaluations not counted.
        value: of the yardstick.
    """

    step: int
    tokens: float
    seconds: float
    value: float


@dataclass(frozen=True)
class RunResult:
    """One run: a variant with a seed.

    Attributes:
        variant: what sets it apart from the others, e.g. `token` or `hybrid gamma=0.5`.
        seed: of the run; runs of one seed saw the same prompts and the same uniform numbers.
        status: of the MLflow run: FINISHED, FAILED, KILLED.
        run_id: of the MLflow run.
        prompts: hash of every validation prompt, in order; the same in all runs that may be paired.
        per_prompt: yardstick -> its final value of every prompt, in the order of `prompts`: the mean over the prompt's
            tokens, or completions for accuracy, length and truncation; nats where the yardstick has them.
        curves: yardstick -> its means over all prompts, by step.
        cost: `steps` that were logged; `tokens` and `seconds` of training until the last evaluation;
            `peak_memory_mb` of a finished run.
        settings: what it learned from and how, by key: the same for every seed of a variant.
    """

    variant: str
    seed: int
    status: str
    run_id: str
    prompts: tuple[str, ...]
    per_prompt: dict[str, list[float]]
    curves: dict[str, list[Point]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
