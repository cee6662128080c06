"""Name the files of a run's folder, and see that a run replaces nothing there but its own.

`train` claims and fills the folder. The command `export` and the runs of a comparison look into it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank

from lit_opd.config import Config
from lit_opd.errors import LintWarning, UserError
from lit_opd.files import only_one, write_file
from lit_opd.runs.checkpoints import read_training_state

__all__ = ["RunFolder", "check_export", "check_writable"]


class RunFolder:
    """Paths inside `output_dir`, and what a run may do there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # resolved
        self.notes = path / "run.json"  # for a resumed run: its MLflow run, results before training, how it ended
        self.checkpoints = path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.best_checkpoint = self.checkpoints / "best.ckpt"  # by checkpoint.keep_best
        self.student = path / "student"  # exported, a Hugging Face folder
        self.summary = path / "summary.json"  # the results
        self.prompts = path / "prompts.json"  # the last evaluation, prompt by prompt
        self.completions = path / "completions.jsonl"  # those of the last evaluation
        self.profile = path / "profile"  # of a few steps, when it was asked for

    def claim(self, resume: str | None) -> Path | None:
        """Find the checkpoint to continue from, None for a new run, and write nothing.

        Args:
            resume: None for a new run; a checkpoint; or `auto`, the newest checkpoint where there is one.

        Raises:
            UserError: the folder holds another run or what no run made, or cannot be written to; no such checkpoint.
        """
        if resume == "auto":
            checkpoint = self.last_checkpoint if self.last_checkpoint.is_file() else None
        else:
            checkpoint = None if resume is None else Path(resume)
        if checkpoint is not None:
            read_training_state("--resume", checkpoint)
        if _is_first():  # it may have begun the run before the others come here
            self._check_place(resume)
        check_writable("output_dir", self.path)
        return checkpoint

    def _check_place(self, resume: str | None) -> None:
        continued = resume == "auto" or (resume is not None and self.holds(Path(resume)))
        own = (self.notes, self.config, self.checkpoints, self.student, self.summary, self.prompts,
               self.completions, self.profile)  # fmt: skip
        there = [path.name for path in own if path.exists()]
        is_run = {self.notes.name, self.config.name} & set(there)
        ended_at_once = self.read_notes().get("ended") in ("FAILED", "KILLED") and not self.last_checkpoint.is_file()
        if not there or (is_run and (continued or ended_at_once)):
            return
        if is_run:
            remedy = "Set output_dir=NEW, delete the folder, or add --resume auto to continue that run."
            raise UserError("output_dir", "a new folder", f"{str(self.path)!r}, which holds another run", remedy)
        found = f"{str(self.path)!r}, which holds {', '.join(there)} of something else"
        raise UserError("output_dir", "a folder where nothing would be replaced", found, "Set output_dir=NEW.")

    @contextmanager
    def held(self, resume: str | None) -> Iterator[None]:
        """Make the folder and keep other runs out of it. After a mistake of the user it is as it was."""
        if not _is_first():
            yield
            return
        was_there, was_locked = self.path.exists(), (self.path / "lock").exists()
        with only_one("output_dir", self.path):
            self._check_place(resume)
            others = {path for path in self.path.iterdir() if path.name != "lock" or was_locked}
            kept = {file: file.read_bytes() for file in (self.config, self.notes) if file in others}
            try:
                yield
            except UserError:
                for path in set(self.path.iterdir()) - others:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for file, content in kept.items():
                    write_file(file, content)
                if not was_there:
                    self.path.rmdir()
                raise

    def holds(self, checkpoint: Path) -> bool:
        """Find out whether a checkpoint is one of this run's own."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def find_checkpoint(self, given: str | None, options: str = "--checkpoint") -> Path:
        """Find the checkpoint that `--checkpoint` names, or the newest of the run in this folder.

        A `UserError` offers the options of the command, where there is none.
        """
        if given is None and not self.last_checkpoint.is_file():
            remedy = f"Set output_dir to a run's folder, or give {options}."
            raise UserError("output_dir", "the folder of a run", f"no file {str(self.last_checkpoint)!r}", remedy)
        return Path(given) if given is not None else self.last_checkpoint

    def read_notes(self) -> dict[str, Any]:
        """Read the notes, empty where there are none, or where they are damaged, which is told."""
        if not self.notes.is_file():
            return {}
        with suppress(ValueError):
            if _are_notes(notes := json.loads(self.notes.read_text())):
                return notes
        lost = "a resumed run is recorded anew in MLflow, and without its results before training"
        warnings.warn(f"{self.notes} is damaged: {lost}.", LintWarning, stacklevel=2)
        return {}

    def write_notes(self, **notes: Any) -> None:
        """Add to the notes."""
        write_file(self.notes, json.dumps(self.read_notes() | notes, indent=2))


def _are_notes(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("mlflow_run_id", ""), str):
        return False
    results = [found.get(name, {}) for name in ("before", "teacher")]
    return all(isinstance(held, dict) and all(_is_interval(v) for v in held.values()) for held in results)


def _is_interval(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 3 and all(isinstance(value, int | float) for value in found)


def _is_first() -> bool:
    return _get_rank() in (None, 0)


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that can neither be made nor written to, without making it."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):  # not os.access, which lets root write to /proc and read-only disks
            return
    except OSError as error:
        reason = "may not be written to" if place.is_dir() else "is a file"
        expected, found = "a folder that can be written to", f"{str(folder)!r}: {str(place)!r} {reason}"
        raise UserError(key, expected, found, "Choose another folder.") from error


def check_export(config: Config, folder: Path) -> None:
    """Refuse an export that would replace a model that the run reads."""
    for name in ("student", "teacher", "reference"):
        path = getattr(config, name).path
        if path and Path(path).resolve() == folder.resolve():
            found, remedy = f"{str(folder)!r}, which is {name}.path", "Choose another folder for the export."
            raise UserError("output_dir", "an export that replaces no model that it is made from", found, remedy)
