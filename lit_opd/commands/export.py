"""Write the student of a checkpoint as a Hugging Face folder that any program loads.

The command line calls it for `export`: `fit` exports at its end only, and a run may be stopped before.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from lit_opd.commands.hub import check_hub, push_to_hub
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config, load_config
from lit_opd.config.inputs import DTYPE
from lit_opd.errors import UserError
from lit_opd.files import only_one, replacing
from lit_opd.models import export_adapter, export_student, load_student
from lit_opd.runs.checkpoints import load_weights, read_checkpoint
from lit_opd.runs.folder import RunFolder, check_export, check_writable
from lit_opd.runs.model_card import write_card
from lit_opd.runs.prepare import check_weight_files

__all__ = ["export"]


def export(
    config: Config,
    checkpoint: str | None,
    out: str | None,
    adapter_only: bool = False,
    dtype: str | None = None,
    hub: str | None = None,
) -> None:
    """Write the student of a checkpoint, or of the newest of the run, to a folder, and print where.

    Args:
        config: of the run.
        checkpoint: a file, or None for the newest in `output_dir`.
        out: a new folder, or None for `student` or, of adapters alone, `adapter` in that of the run.
        adapter_only: write the adapters of a LoRA student without the weights that they change.
        dtype: of the written weights, by default the student's.
        hub: ORGANISATION/NAME, to upload it there.
    """
    quiet_libraries()
    _check_options(config, adapter_only, dtype, hub)
    folder = RunFolder(Path(config.output_dir))
    file = folder.find_checkpoint(checkpoint)
    step = read_checkpoint("--checkpoint", file).get("global_step", 0)
    # What a card tells of a run is what it was made with, whatever this command was given.
    made_with = load_config([folder.config]) if folder.holds(file) and folder.config.is_file() else config
    usual = folder.path / "adapter" if adapter_only else folder.student
    destination = Path(out) if out else usual
    check_writable("--out", destination)
    check_export(config, destination)
    own = destination.resolve() == usual.resolve() and folder.notes.is_file()
    if not own and destination.is_dir() and any(destination.iterdir()):
        found = f"{str(destination)!r}, which holds files"
        raise UserError("--out", "a folder that is new or empty", found, "Name another.")
    check_weight_files(config.student, "student")
    student = load_student(config.student)
    load_weights("--checkpoint", student.model, file)
    with only_one("output_dir", folder.path) if own else nullcontext(), replacing(destination) as part:
        if adapter_only:
            export_adapter(student, load_student(replace(config.student, lora=None)), part)
        else:
            export_student(student, part, getattr(torch, dtype) if dtype else None)
        write_card(part, made_with, folder, step)
    print(destination)
    if hub is not None:
        print(push_to_hub(destination, hub))


def _check_options(config: Config, adapter_only: bool, dtype: str | None, hub: str | None) -> None:
    if adapter_only and config.student.lora is None:
        expected, found = "a student with adapters (student.lora)", "one all of whose weights train"
        raise UserError("--adapter-only", expected, found, "Drop it, and the student is exported.")
    if adapter_only and dtype is not None:
        raise UserError("--dtype", "nothing beside --adapter-only: adapters stay as they are", dtype, "Drop it.")
    if dtype is not None:
        DTYPE("--dtype", dtype)
    if hub is not None:
        check_hub(hub)
