"""The range of every value of the configuration that needs no model and no data to be judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_opd.errors import UserError, choose

if TYPE_CHECKING:
    from lit_opd.config import Config, RolloutConfig

__all__ = ["check_values"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("none", "8bit", "4bit")

# Bounds as (section.key, test, what is expected): the ranges every command relies on.
_BOUNDS: list[tuple[str, Any, str]] = [
    ("teacher.temperature", lambda v: v > 0, "above 0"),
    ("data.batch_size", lambda v: v >= 1, "at least 1"),
    ("data.validation_size", lambda v: v >= 1, "at least 1"),
    ("data.max_prompt_tokens", lambda v: v >= 1, "at least 1"),
    ("data.train_size", lambda v: v is None or v >= 1, "at least 1, or null for all"),
    ("rollout.num_completions", lambda v: v >= 1, "at least 1"),
    ("rollout.max_new_tokens", lambda v: v >= 1, "at least 1"),
    ("rollout.min_new_tokens", lambda v: v >= 0, "at least 0"),
    ("rollout.temperature", lambda v: v >= 0, "at least 0"),
    ("rollout.top_p", lambda v: 0 < v <= 1, "in (0, 1]"),
    ("rollout.top_k", lambda v: v >= 0, "at least 0 (0 keeps all tokens)"),
    ("rollout.student_share", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("rollout.min_p", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("estimator.adapt_gamma_every", lambda v: v is None or v >= 1, "at least 1, or null for a fixed gamma"),
    ("optim.lr", lambda v: v > 0, "above 0"),
    ("optim.clip_norm", lambda v: v is None or v > 0, "above 0, or null for no clipping"),
    ("optim.warmup_steps", lambda v: v >= 0, "at least 0"),
    ("optim.updates_per_rollout", lambda v: v >= 1, "at least 1"),
    ("optim.micro_batch_tokens", lambda v: v >= 1, "at least 1"),
    ("optim.head_chunk_mib", lambda v: v >= 1, "at least 1"),
    ("evaluation.every_n_steps", lambda v: v >= 1, "at least 1"),
    ("evaluation.num_completions", lambda v: v >= 1, "at least 1"),
    ("evaluation.batch_size", lambda v: v >= 1, "at least 1"),
    ("measure.units", lambda v: v >= 4, "at least 4"),
    ("measure.prompts_per_unit", lambda v: v >= 1, "at least 1"),
    ("measure.sketch", lambda v: v >= 1, "at least 1"),
    ("diagnostics.every_n_steps", lambda v: v >= 0, "at least 0 (0 leaves them out)"),
    ("diagnostics.support_size", lambda v: v >= 1, "at least 1"),
    ("collapse.window", lambda v: v >= 1, "at least 1"),
    ("collapse.min_entropy", lambda v: v >= 0, "at least 0 (0 never warns)"),
    ("collapse.max_repetition", lambda v: 0 < v <= 1, "in (0, 1] (1 never warns)"),
    ("collapse.max_truncated", lambda v: 0 < v <= 1, "in (0, 1] (1 never warns)"),
    ("collapse.min_support_mass", lambda v: 0 <= v < 1, "in [0, 1) (0 never warns)"),
]

_CHOICES: list[tuple[str, tuple[str, ...]]] = [
    ("student.dtype", DTYPES),
    ("teacher.dtype", DTYPES),
    ("teacher.quantization", QUANTIZATIONS),
    ("reference.dtype", DTYPES),
    ("reference.quantization", QUANTIZATIONS),
    ("data.source", ("file", "hub", "reasoning_gym", "function")),
    ("data.overlong", ("drop", "truncate", "error")),
    ("rollout.engine", ("local", "vllm")),
    ("rollout.demonstrations", ("teacher", "data")),
    ("estimator.aggregation", ("token_mean", "sequence_mean", "sequence_sum")),
    ("collapse.action", ("off", "warn", "stop")),
]


def check_values(config: Config) -> None:
    """Check every bound and choice that needs no model and no data.

    Raises:
        UserError: naming the first key whose value is out of its range.
    """
    for key, allowed in _CHOICES:
        choose(key, _value(config, key), allowed)
    for key, holds, expected in _BOUNDS:
        value = _value(config, key)
        if not holds(value):
            raise UserError(key, f"a value {expected}", value, f"Set {key} to a value {expected}.")
    rollout, evaluation, optim = config.rollout, config.evaluation, config.optim
    if rollout.min_new_tokens > rollout.max_new_tokens:
        raise UserError("rollout.min_new_tokens", f"at most rollout.max_new_tokens ({rollout.max_new_tokens})",
                        rollout.min_new_tokens, "Lower it or raise rollout.max_new_tokens.")  # fmt: skip
    if rollout.engine == "vllm":
        _check_served(rollout)
    for key, frozen in (("teacher", config.teacher), ("reference", config.reference)):
        if frozen.offload and frozen.quantization != "none":
            raise UserError(f"{key}.offload", "false for a quantised model, whose weights stay where they were loaded",
                            True, f"Drop it, or {key}.quantization.")  # fmt: skip
    for k in evaluation.pass_at:
        if not 1 <= k <= evaluation.num_completions:
            limit = f"values from 1 to evaluation.num_completions ({evaluation.num_completions})"
            raise UserError("evaluation.pass_at", limit, k, "Raise evaluation.num_completions or drop it.")
    sequences = config.data.batch_size * rollout.num_completions
    if optim.updates_per_rollout > sequences:
        raise UserError("optim.updates_per_rollout", f"at most data.batch_size x rollout.num_completions ({sequences})",
                        optim.updates_per_rollout, "Lower it or sample more.")  # fmt: skip


def _check_served(rollout: RolloutConfig) -> None:
    """What a vLLM server needs, and the laws it does not have."""
    engine = "with rollout.engine=vllm"
    if not (rollout.server or "").startswith(("http://", "https://")):
        found = "nothing" if rollout.server is None else repr(rollout.server)
        remedy = "Set rollout.server=http://127.0.0.1:8000; how to start one: lit_opd/rollout/vllm.py."
        raise UserError("rollout.server", f"the address of a vLLM server {engine}", found, remedy)
    if rollout.temperature != 0 and not 0.01 <= rollout.temperature <= 2:
        raise UserError("rollout.temperature", f"0, or from 0.01 to 2, {engine}", rollout.temperature,
                        "Set rollout.temperature=1, or rollout.engine=local.")  # fmt: skip
    if rollout.min_p > 0 and rollout.top_p < 1:  # another law than ours, where min_p cuts last
        raise UserError("rollout.min_p", f"0 where rollout.top_p cuts, {engine}", rollout.min_p,
                        "Set one of the two, or rollout.engine=local.")  # fmt: skip


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
