"""Record a few steps with torch's profiler, and write what took how long.

`fit --profile` adds this callback; `lit_opd.perf` does the sums.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from lit_opd.files import replacing, write_file
from lit_opd.module import DistillationModule
from lit_opd.perf import STEP, Breakdown, Part, break_down, peak_memory_mb, phase
from lit_opd.tracking import log_files, logger_of

__all__ = ["ProfileSteps", "phase_table"]


class ProfileSteps(L.Callback):
    """Record a few steps after a warm-up, and write what they spent where.

    The window ends early where the run ends, an evaluation begins, or it has lasted long: a trace grows with every
    operator. In a run too short for the warm-up the last step is recorded. With several processes the first records.
    No number of the training changes, but steps under the profiler take somewhat longer.

    Args:
        folder: gets `trace.json.gz` (a chrome trace, for Perfetto or chrome://tracing), `phases.json` and `phases.md`,
            which also become artifacts `profile/` of the MLflow run.
        skip: steps before the first that is recorded.
        record: steps to record.
        seconds: no further step is recorded after so many.
    """

    def __init__(self, folder: str | Path, skip: int = 2, record: int = 3, seconds: float = 10.0) -> None:
        self.folder = Path(folder)
        self.skip, self.record, self.seconds = skip, record, seconds
        self.breakdown: Breakdown | None = None
        self.peak_mb = 0.0
        self._wait: float = skip
        self._done, self._began = 0, 0.0
        self._profiler: Any = None
        self._open = ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:  # type: ignore[override]
        """Find out how long to wait."""
        self._wait = min(self.skip, _steps_left(trainer, pl_module) - 1) if trainer.is_global_zero else math.inf

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Begin to record where it is time, and open the range of the step."""
        if self._wait == 0:
            self.peak_mb = peak_memory_mb(pl_module.device)  # now: the recording itself takes memory
            self._profiler = torch.profiler.profile()
            self._profiler.start()
            self._done, self._began = 0, perf_counter()
        self._wait -= 1
        if self._profiler is not None:
            self._open.enter_context(phase(STEP))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Close the range of the step, and write after the last."""
        self._open.close()
        self._done += 1
        if self._done == self.record or perf_counter() - self._began > self.seconds:
            self._finish(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the window: an evaluation is not part of a step."""
        self._finish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the window with the run."""
        self._finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop recording, and write nothing."""
        self._open.close()
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print what was found, when the bar of the run is closed."""
        if stage == "fit" and trainer.is_global_zero:
            print(f"profile: {self.folder}\n\n{self._phases()}\n" if self.breakdown else "profile: no step to record\n")

    def _phases(self) -> str:
        table = phase_table(self.breakdown) if self.breakdown else ""
        return f"{table}\n\npeak memory before the recording: {self.peak_mb:.0f} MB"

    def _stop(self) -> Any:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler

    def _finish(self, trainer: L.Trainer) -> None:
        profiler = self._stop()
        if profiler is None:
            return
        self.breakdown = break_down(profiler.profiler.kineto_results)
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        profiler.export_chrome_trace(str(trace))
        # Lightly: the exporter's own compression takes longer than all the rest.
        packing = partial(gzip.open, mode="wb", compresslevel=1)
        with replacing(Path(f"{trace}.gz")) as part, trace.open("rb") as file, packing(part) as packed:
            shutil.copyfileobj(file, packed)
        trace.unlink()
        numbers = asdict(self.breakdown) | {"peak_memory_before_mb": self.peak_mb}
        write_file(self.folder / "phases.json", json.dumps(numbers, indent=2))
        rows = [_row(*item) for item in self.breakdown.operators.items()]  # the longest first
        operators = _table("operator, by its own time", rows)
        write_file(self.folder / "phases.md", f"{self._phases()}\n\n{operators}\n")
        log_files(logger_of(trainer), {kept.name: kept.read_bytes() for kept in self.folder.iterdir()}, "profile")


def phase_table(found: Breakdown) -> str:
    """Write the phases in Markdown, in the order of a step."""
    step = {"step": Part(found.step_s, share=1.0, calls=1)}
    between = [] if found.between_s is None else [("between steps", f"{found.between_s:.4f}", "", "")]
    return _table(f"phase, mean of {found.steps}", [*(_row(*item) for item in (found.phases | step).items()), *between])


def _row(name: str, part: Part) -> tuple[str, ...]:
    return name, f"{part.seconds:.4f}", f"{part.share:.1%}", f"{part.calls:.4g}"


def _table(title: str, rows: list[tuple[str, ...]]) -> str:
    table = Table(title, box=MARKDOWN)
    for name in ("s a step", "share", "calls"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(file=(text := StringIO()), width=1000).print(table, markup=False)
    return text.getvalue().strip()


def _steps_left(trainer: L.Trainer, module: DistillationModule) -> float:
    """Count the batches to train on, on each of which an optimizer may step several times."""
    updates = module.optim_config.updates_per_rollout
    batches = trainer.estimated_stepping_batches * updates
    total = min(limit for limit in (trainer.max_steps, batches, math.inf) if limit > 0)
    return math.ceil((total - trainer.global_step) / updates) if total < math.inf else math.inf
