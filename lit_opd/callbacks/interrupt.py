"""End a run on Ctrl-C between two steps, where its state is whole, and save it.

Why here: Lightning ends a run wherever it is. Every trainer of `fit` has it; so may a user's own.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_opd.module import NonFiniteStepError

__all__ = ["SaveOnInterrupt"]


class SaveOnInterrupt(L.Callback):
    """Saves a checkpoint to `path` on Ctrl-C and on a non-finite step.

    The first Ctrl-C lets the step under way finish, saves, and ends the run; the second ends it at once, with what the
    last checkpoint holds. A non-finite step has not moved the weights, so they are saved as they are.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._asked = self._saved = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl-C, and for the signal by which a scheduler ends a job."""
        self._asked = self._saved = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where Ctrl-C was pressed during the step, in whichever process."""
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer.save_checkpoint(self.path)
            self._saved = True

    # Lightning logs the metrics of a step after `on_train_batch_end`: the run ends with whatever would come next.

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run after the step that was saved."""
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the run after the step that was saved."""
        self._end()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the weights of before a step that could not be made, and say how to go on."""
        self._restore()
        if isinstance(exception, NonFiniteStepError):
            trainer.save_checkpoint(self.path)
        if isinstance(exception, NonFiniteStepError | KeyboardInterrupt) and self.path.is_file():
            resume = f"--resume auto, or with trainer.fit(..., ckpt_path={str(self.path)!r})"
            _say(f"Saved {self.path}. Go on with {resume}.")

    def _end(self) -> None:
        if self._saved:
            self._saved = False
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        _say("Interrupted: finishing this step, then saving. Press Ctrl-C again to stop at once.")


@rank_zero_only
def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
