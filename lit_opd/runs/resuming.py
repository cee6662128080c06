"""Say which keys of the configuration may change where a run is resumed, and hold a run to it.

Why here: a checkpoint brings back weights, optimizer and position, so a new value beside them may be a value that
nobody uses. `train` compares the configuration with the one that the checkpoint was made with.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import yaml

from lit_opd.config import Config, to_yaml
from lit_opd.errors import LintWarning, UserError

__all__ = ["AT_A_RESUME", "check_changes"]

AT_A_RESUME: dict[str, tuple[str, ...]] = {
    # What the checkpoint holds, or what names the run: half of it would be made with the one and half with the other.
    "refused": (
        "seed", "student.path", "student.dtype", "student.gguf_file", "student.lora", "student.dropout",
        "teacher.path", "teacher.extra_tokens", "teacher.least_aligned",
        "teacher.kind", "teacher.model", "teacher.prompt", "teacher.reads", "teacher.follow", "teacher.follow_rate",
        "teacher.follow_every",
        "teacher.temperature", "teacher.gguf_file", "teachers", "teachers_combined", "teachers_schedule",
        "data.teacher_column",
        "reference.path", "reference.gguf_file", "estimator.name", "estimator.kwargs", "estimator.terms",
        "estimator.masked_tokens", "estimator.merged_stops", "estimator.aggregation", "optim.name", "optim.kwargs",
        "trainer.precision", "tracking.experiment",
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
        "diagnostics.print_every_n_steps", "diagnostics.figures", "collapse.window", "collapse.min_entropy",
        "collapse.max_repetition", "collapse.max_truncated", "collapse.min_support_mass", "tracking.uri",
        "tracking.run_name", "tracking.tags", "tracking.system_metrics",
    ),
}  # fmt: skip
"""What becomes of another value, by key. That of any other key is used from the first step on, and told."""


def check_changes(config: Config, checkpoint: Path, own: bool) -> None:
    """Compare a configuration with that of the checkpoint which it resumes, and refuse or tell what differs.

    Args:
        config: to go on with.
        checkpoint: in the folder of the run that wrote it; elsewhere there is nothing to compare with.
        own: the run goes on in its own folder, and so in its own MLflow run.
    """
    before = checkpoint.resolve().parents[1] / "config.yaml"
    if checkpoint.resolve().parent.name != "checkpoints" or not before.is_file():
        return
    found = changes(before, config)
    changed = {key: values for key, values in found.items() if own or not key.startswith("tracking.")}
    if kept := [key for key in AT_A_RESUME["refused"] if key in changed]:
        old, new = (", ".join(repr(changed[key][place]) for key in kept) for place in (0, 1))
        remedy = (
            f"Set {'it' if len(kept) == 1 else 'them'} back; or `python -m lit_opd export` this checkpoint, and begin "
            "a new run with student.path set to that folder."
        )
        raise UserError(", ".join(kept), f"{old}, as the run has it ({before})", new, remedy)
    told = [f"{key} from {old!r} to {new!r}" for key, (old, new) in changed.items() if key not in AT_A_RESUME["taken"]]
    if told:
        warnings.warn(f"the resumed run changes {', '.join(told)}.", LintWarning, stacklevel=2)


def changes(before: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Compare with a `config.yaml`, and find every key whose value differs, with both values.

    A key that an earlier version did not have is no change.
    """
    old, new = (_by_key(yaml.safe_load(text)) for text in (before.read_text(), to_yaml(config)))
    unset = {key: None for key in old | new if key.startswith("trainer.")}  # the mapping holds what somebody set
    old, new = unset | old, unset | new
    return {key: (old[key], value) for key, value in new.items() if key in old and not _same(key, old[key], value)}


def _by_key(tree: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, held in (tree if isinstance(tree, dict) else {}).items():
        if section == "teachers":  # one value, of what is refused of a teacher
            names = {key.removeprefix("teacher.") for key in AT_A_RESUME["refused"] if key.startswith("teacher.")}
            found[section] = {n: {k: v for k, v in one.items() if k in names} for n, one in held.items()}
            continue
        if section == "teachers_schedule":  # one value, which may be empty
            found[section] = held
            continue
        found |= (
            {f"{section}.{name}": value for name, value in held.items()} if isinstance(held, dict) else {section: held}
        )
    return found


def _same(key: str, old: Any, new: Any) -> bool:
    both = isinstance(old, str) and isinstance(new, str)
    return old == new or (both and key.endswith(".path") and os.path.realpath(old) == os.path.realpath(new))
