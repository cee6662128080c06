"""Name the files of a run's folder, and see that no run begins in the folder of another.

`train` claims and fills the folder. The command `export` and the runs of a comparison look into it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank

from lit_opd.errors import UserError
from lit_opd.runs.checkpoints import read_training_state

__all__ = ["RunFolder", "check_writable"]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `output_dir`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def student(self) -> Path:
        """The exported student, a Hugging Face folder."""
        return self.path / "student"

    @property
    def notes(self) -> Path:
        """Notes for a resumed run on its beginning: the MLflow run and the results before training."""
        return self.path / "run.json"

    @property
    def profile(self) -> Path:
        """The profile of a few steps, when it was asked for."""
        return self.path / "profile"

    @property
    def summary(self) -> Path:
        """The results, as JSON."""
        return self.path / "summary.json"

    @property
    def prompts(self) -> Path:
        """The last evaluation, prompt by prompt."""
        return self.path / "prompts.json"

    def claim(self, resume: str | None) -> Path | None:
        """Find out whether a run may begin here, or the run in it go on, and write nothing.

        Args:
            resume: None for a new run; `auto` to continue from the newest checkpoint where there is one; or the path
                of a checkpoint.

        Returns:
            The checkpoint to continue from, or None.

        Raises:
            UserError: the folder holds another run, or cannot be written to; no such checkpoint, or a damaged one.
        """
        checkpoint = Path(resume) if resume not in (None, "auto") else self.last_checkpoint if resume else None
        if checkpoint == self.last_checkpoint and not checkpoint.is_file() and resume == "auto":
            checkpoint = None
        if checkpoint is not None:
            read_training_state("--resume", checkpoint)
        continued = resume == "auto" or (checkpoint and checkpoint.resolve().parent == self.checkpoints.resolve())
        # Only the first process looks: it may have begun the run before the others come here.
        if self.config.exists() and not continued and _get_rank() in (None, 0):
            remedy = "Set output_dir=NEW, delete the folder, or add --resume auto to continue that run."
            raise UserError("output_dir", "a new folder", f"{str(self.path)!r}, which holds another run", remedy)
        check_writable("output_dir", self.path)
        return checkpoint

    def find_checkpoint(self, given: str | None) -> Path:
        """Find the checkpoint that `--checkpoint` names, or the newest of the run in this folder.

        Raises:
            UserError: none is named, and there is no run here.
        """
        if given is None and not self.last_checkpoint.is_file():
            remedy = "Set output_dir to a run's folder, or give --checkpoint."
            raise UserError("output_dir", "the folder of a run", f"no file {str(self.last_checkpoint)!r}", remedy)
        return Path(given) if given is not None else self.last_checkpoint

    def make(self) -> None:
        """Make the folder.

        Raises:
            UserError: the file system refuses.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("output_dir", "a folder that can be made", str(error), "Set output_dir.") from error

    def read_notes(self) -> dict[str, Any]:
        """Read the notes, empty where there are none."""
        return json.loads(self.notes.read_text()) if self.notes.is_file() else {}

    def write_notes(self, **notes: Any) -> None:
        """Add to the notes."""
        self.notes.write_text(json.dumps(self.read_notes() | notes, indent=2))


def check_writable(key: str, folder: Path) -> None:
    """Find out whether a folder can be made, or written to, without making it.

    Raises:
        UserError: something on its path is a file, or may not be written to.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "may not be written to" if place.is_dir() else "is a file"
        remedy = "Choose another folder."
        raise UserError(key, "a folder that can be written to", f"{str(folder)!r}: {str(place)!r} {reason}", remedy)
