"""The student as a Hugging Face folder that any program loads."""

from __future__ import annotations

import copy
from pathlib import Path

from lit_opd.config import StudentConfig
from lit_opd.lab.checks import check_weight_files
from lit_opd.lab.folder import check_writable, load_weights, read_checkpoint
from lit_opd.models import LanguageModel, load_student

__all__ = ["export_checkpoint", "export_student"]


def export_student(student: LanguageModel, folder: Path) -> Path:
    """Write model, tokenizer and generation config; LoRA adapters are merged into a copy of the weights.

    Args:
        student: the model.
        folder: made where it does not exist.

    Returns:
        The folder.
    """
    model = student.model
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    model.save_pretrained(folder)  # type: ignore[operator]
    student.tokenizer.save_pretrained(folder)
    return folder


def export_checkpoint(config: StudentConfig, checkpoint: Path, folder: Path) -> Path:
    """Write the student of a checkpoint.

    Args:
        config: the student the checkpoint was trained from.
        checkpoint: a file that `fit` wrote.
        folder: where to write.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another student; a folder that cannot be written to.
    """
    read_checkpoint("--checkpoint", checkpoint)
    check_writable("--out", folder)
    check_weight_files(config, "student")
    student = load_student(config)
    load_weights("--checkpoint", student.model, checkpoint)
    return export_student(student, folder)
