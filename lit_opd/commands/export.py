"""Write the student of a checkpoint as a Hugging Face folder that any program loads.

The command line calls it for `export`: `fit` exports at its end only, and a run may be stopped before.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.errors import UserError
from lit_opd.files import only_one, replacing
from lit_opd.models import export_student, load_student
from lit_opd.runs.checkpoints import load_weights, read_checkpoint
from lit_opd.runs.folder import RunFolder, check_export, check_writable
from lit_opd.runs.prepare import check_weight_files

__all__ = ["export"]


def export(config: Config, checkpoint: str | None, out: str | None) -> None:
    """Write the student of a checkpoint, or of the newest of the run, to a folder, or to the run's, and print where."""
    quiet_libraries()
    folder = RunFolder(Path(config.output_dir))
    file = folder.find_checkpoint(checkpoint)
    read_checkpoint("--checkpoint", file)
    destination = Path(out) if out else folder.student
    check_writable("--out", destination)
    check_export(config, destination)
    own = destination.resolve() == folder.student.resolve() and folder.notes.is_file()
    if not own and destination.is_dir() and any(destination.iterdir()):
        raise UserError(
            "--out", "a folder that is new or empty", f"{str(destination)!r}, which holds files", "Name another."
        )
    check_weight_files(config.student, "student")
    student = load_student(config.student)
    load_weights("--checkpoint", student.model, file)
    with only_one("output_dir", folder.path) if own else nullcontext(), replacing(destination) as part:
        export_student(student, part)
    print(destination)
