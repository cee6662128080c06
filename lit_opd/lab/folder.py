"""The folder of a run: its configuration, its checkpoints, the exported student, its summary."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_opd.errors import UserError

__all__ = ["RunFolder", "load_weights", "read_checkpoint"]


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
        """What a resumed run must know of its beginning: the MLflow run and the results before training."""
        return self.path / "run.json"

    @property
    def summary(self) -> Path:
        """The results, as JSON."""
        return self.path / "summary.json"

    def claim(self, resume: str | None) -> Path | None:
        """Take the folder for a run, or continue the run in it.

        Args:
            resume: None for a new run; `auto` to continue from the newest checkpoint where there is one; or the path
                of a checkpoint.

        Returns:
            The checkpoint to continue from, or None.

        Raises:
            UserError: the folder holds another run and `resume` is None; no such checkpoint.
        """
        if resume not in (None, "auto"):
            assert resume is not None
            if not Path(resume).is_file():
                raise UserError("--resume", "auto or a checkpoint", f"no file {resume!r}", "Check the path.")
            return Path(resume)
        if self.config.exists() and resume is None:
            remedy = "Set output_dir=NEW, delete the folder, or add --resume auto to continue that run."
            raise UserError("output_dir", "a new folder", f"{str(self.path)!r}, which holds another run", remedy)
        return self.last_checkpoint if resume == "auto" and self.last_checkpoint.is_file() else None

    def read_notes(self) -> dict[str, Any]:
        """The notes, empty where there are none."""
        return json.loads(self.notes.read_text()) if self.notes.is_file() else {}

    def write_notes(self, **notes: Any) -> None:
        """Add to the notes."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.notes.write_text(json.dumps(self.read_notes() | notes, indent=2))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, read as plain tensors and values only.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError("--checkpoint", "a checkpoint file", f"no file {str(path)!r}", "Check the path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "It is damaged or no checkpoint of lit_opd: choose an earlier one."
        raise UserError("checkpoint", "a readable checkpoint", f"{path}: {reason[:120]}", remedy) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError("checkpoint", "a checkpoint of lit_opd", f"{path}, without weights", "Choose another file.")
    return checkpoint


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Put a checkpoint's student weights into a model; weights that training never changed stay.

    Raises:
        UserError: damaged, or of another model.
    """
    weights = read_checkpoint(path)["state_dict"]
    own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    try:
        result = model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise UserError(
            "checkpoint", "weights of this student", f"{path}, of other shapes", "Set student.path."
        ) from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if result.unexpected_keys or trained & set(result.missing_keys):
        first = (result.unexpected_keys or sorted(trained & set(result.missing_keys)))[0]
        raise UserError(
            "checkpoint", "weights of this student", f"{path}, which differs at {first!r}", "Set student.path."
        )
