"""Say which keys of the configuration may change where a run is resumed, and hold a run to it.

Why here: a checkpoint brings back weights, optimizer and position, so a new value beside them may be a value that
nobody uses. `train` compares the configuration with the one that the checkpoint was made with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_opd.config import Config, to_yaml
from lit_opd.errors import UserError

__all__ = ["AT_A_RESUME", "check_changes"]

AT_A_RESUME: dict[str, tuple[str, ...]] = {
    # What the checkpoint holds, or what names the run: half of it would be made with the one and half with the other.
    "refused": (
        "seed", "student.path", "student.dtype", "student.gguf_file", "student.lora", "student.dropout",
        "teacher.path", "teacher.kind", "teacher.model", "teacher.prompt", "teacher.follow", "teacher.follow_rate",
        "teacher.follow_every",
        "teacher.temperature", "teacher.gguf_file", "reference.path", "reference.gguf_file", "estimator.name",
        "estimator.kwargs", "estimator.terms", "estimator.masked_tokens", "estimator.aggregation", "optim.name",
        "optim.kwargs", "trainer.precision", "tracking.experiment",
    ),
    # Used from the first step on: of a schedule, what it gives at that step.
    "told": (
        "student.trust_remote_code", "teacher.dtype", "teacher.quantization", "teacher.trust_remote_code",
        "reference.dtype", "reference.quantization", "reference.trust_remote_code", "data.source", "data.path",
        "data.validation_path", "data.split", "data.kwargs", "data.prompt_column", "data.answer_column", "data.chat",
        "data.system_prompt", "data.examples", "data.prompt_template", "data.train_size", "data.validation_size",
        "data.validation_seed", "data.max_prompt_tokens", "data.overlong", "data.batch_size", "data.verifier",
        "data.last_assistant_turn", "data.verifier_seconds", "data.on_verifier_error",
        "rollout.engine", "rollout.num_completions", "rollout.max_new_tokens", "rollout.min_new_tokens",
        "rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.min_p", "rollout.student_share",
        "rollout.demonstrations", "optim.lr", "optim.scheduler", "optim.scheduler_kwargs", "optim.warmup_steps",
        "optim.clip_norm", "optim.updates_per_rollout", "trainer", "callbacks", "evaluation.every_n_steps",
        "evaluation.num_completions", "evaluation.max_new_tokens", "evaluation.pass_at", "evaluation.seed",
        "evaluation.teacher", "evaluation.measures", "collapse.action", "lint.allow",
    ),
    # No number of the training or of an evaluation depends on them, or they say how long to go on.
    "taken": (
        "output_dir", "teacher.server", "teacher.top_k", "teacher.key_variable", "teacher.in_flight",
        "teacher.timeout_s", "teacher.patience_s", "teacher.canary_every", "student.gradient_checkpointing",
        "teacher.offload", "reference.offload", "rollout.server",
        "optim.micro_batch_tokens", "optim.head_chunk_mib", "trainer.max_steps", "trainer.max_epochs",
        "trainer.max_time", "trainer.log_every_n_steps", "trainer.enable_progress_bar", "evaluation.batch_size",
        "evaluation.num_examples", "measure.estimators", "measure.units", "measure.prompts_per_unit",
        "measure.parameters", "measure.sketch", "diagnostics.every_n_steps", "diagnostics.support_size",
        "diagnostics.figures", "collapse.window", "collapse.min_entropy", "collapse.max_repetition",
        "collapse.max_truncated", "collapse.min_support_mass", "tracking.uri", "tracking.run_name", "tracking.tags",
        "tracking.system_metrics",
    ),
}  # fmt: skip
"""What becomes of another value, and of which keys: `trainer` is for all its keys that are not named themselves."""

_LACKING = object()


def check_changes(config: Config, checkpoint: Path, own: bool) -> None:
    """Compare a configuration with that of the checkpoint which it resumes, and tell what will be used from now on.

    Args:
        config: to go on with.
        checkpoint: in the folder of the run that wrote it; elsewhere there is nothing to compare with.
        own: the run goes on in its own folder, and so in its own MLflow run.

    Raises:
        UserError: another value of a key that has to stay.
    """
    before = checkpoint.resolve().parents[1] / "config.yaml"
    if checkpoint.resolve().parent.name != "checkpoints" or not before.is_file():
        return
    changed = {key: values for key, values in changes(before, config) if own or not key.startswith("tracking.")}
    if kept := [key for key in AT_A_RESUME["refused"] if key in changed]:
        old, new = (", ".join(repr(changed[key][place]) for key in kept) for place in (0, 1))
        remedy = (
            f"Set {'it' if len(kept) == 1 else 'them'} back; or `python -m lit_opd export` this checkpoint, and begin "
            "a new run with student.path set to that folder."
        )
        raise UserError(", ".join(kept), f"{old}, as the run has it ({before})", new, remedy)
    if told := [f"{key} from {old!r} to {new!r}" for key, (old, new) in changed.items() if key in AT_A_RESUME["told"]]:
        _say(f"warning: the resumed run changes {', '.join(told)}.")


def changes(before: Path, config: Config) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Compare with a `config.yaml`, and yield every key of the table whose value differs, with both values.

    A key that an earlier version did not have is no change.
    """
    sides = yaml.safe_load(before.read_text()), yaml.safe_load(to_yaml(config))
    keys = [key for keys in AT_A_RESUME.values() for key in keys]
    for key in keys:
        old, new = (_value(side, key, keys) for side in sides)
        if old is not _LACKING and not _same(key, old, new):
            yield key, (old, new)


def _value(tree: Any, key: str, keys: list[str]) -> Any:
    section, _, name = key.partition(".")
    if not isinstance(tree, dict) or section not in tree:
        return _LACKING
    held = tree[section]
    if not name:
        own = {other.partition(".")[2] for other in keys if other.startswith(f"{key}.")}
        return {k: v for k, v in held.items() if k not in own} if isinstance(held, dict) else held
    # A mapping of the user's own lacks what nobody set.
    return held.get(name, None if section in keys else _LACKING) if isinstance(held, dict) else _LACKING


def _same(key: str, old: Any, new: Any) -> bool:
    both = isinstance(old, str) and isinstance(new, str)
    return old == new or (both and key.endswith(".path") and os.path.realpath(old) == os.path.realpath(new))


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
