"""Say what a run came to, write it as the run's summary, and read it back where the run is resumed after its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lit_opd import tracking
from lit_opd.config import Config
from lit_opd.measures.intervals import Interval
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.resuming import changes

__all__ = ["Outcome", "Results", "as_json", "ended_before"]

Results = dict[str, Interval]


@dataclass(frozen=True)
class Outcome:
    """The end of a run: held-out results before, after and of the teacher, and where things lie.

    `perf` holds medians over the steps of this process, and the largest of the peak memory. `checkpoint` is of the
    student that was measured last and exported: the last one, or the best of a run that was stopped for collapse, which
    was made at `exported_step` of the `steps`.
    """

    before: Results
    after: Results
    teacher: Results
    steps: int
    perf: dict[str, float]
    checkpoint: Path
    student: Path
    logger: tracking.RunLogger
    exported_step: int | None = None


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Write everything but the logger as JSON has it."""
    values = {k: v for k, v in vars(outcome).items() if k != "logger"}
    for name in ("before", "after", "teacher"):
        values[name] = {metric: interval._asdict() for metric, interval in getattr(outcome, name).items()}
    return values | {"checkpoint": str(outcome.checkpoint), "student": str(outcome.student)}


def ended_before(config: Config, folder: RunFolder, checkpoint: Path) -> Outcome | None:
    """Read how the run of a folder ended, if it did and the configuration does not tell it to go on."""
    notes = folder.read_notes()
    if not (notes.get("ended") == "FINISHED" and folder.summary.is_file() and folder.holds(checkpoint)):
        return None
    if any(key.startswith("trainer") or key == "collapse.action" for key in changes(folder.config, config)):
        return None
    found = json.loads(folder.summary.read_text())
    results: dict[str, Any] = {
        name: {k: Interval(**v) for k, v in found[name].items()} for name in ("before", "after", "teacher")
    }
    where: Any = SimpleNamespace(run_id=notes["mlflow_run_id"], experiment_id=notes["mlflow_experiment_id"])
    rest: dict[str, Any] = {name: found.get(name) for name in ("steps", "perf", "exported_step")}
    checkpoint = folder.checkpoints / Path(found["checkpoint"]).name
    return Outcome(**results, **rest, checkpoint=checkpoint, student=folder.student, logger=where)
