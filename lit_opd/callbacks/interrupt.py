"""End a run where its state is whole when it is asked to stop, and save it.

Why here: Lightning ends a run wherever it is. Every trainer of `fit` has it; so may a user's own.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_opd.module import NonFiniteStepError
from lit_opd.stopping import Stopped, StoppedWaiting, heeding, put_off

__all__ = ["SaveOnInterrupt"]


class SaveOnInterrupt(L.Callback):
    """Saves a checkpoint to `path` on Ctrl-C, SIGTERM and SIGHUP, and on a non-finite step.

    The first signal lets the step under way finish, saves, and ends the run. An evaluation is given up, and made anew
    when the run is resumed, and so is a step that waits for a teacher's server (with one process: others could not
    know). The second signal ends the run at once, with what the last checkpoint holds. A non-finite step, or one that
    was given up, has not moved the weights, so they are saved as they are.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._asked: int | None = None
        self._saved, self._evaluating, self._alone = 0, False, True
        self._evaluation_begun: dict[str, Any] | None = None
        self._listening = ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl-C, and for the signals by which a scheduler or a lost terminal ends a job."""
        self._asked, self._saved, self._evaluating, self._alone = None, 0, False, trainer.world_size == 1
        self._listening.enter_context(heeding(self._ask))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save where a signal came during the step, in whichever process."""
        if asked := self._asked_anywhere(trainer):
            trainer.save_checkpoint(self.path)
            self._saved = asked

    # Lightning logs the metrics of a step after `on_train_batch_end`: the run ends with whatever would come next.

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End the run after the step, or the evaluation, that was saved, or that the signal came too late for."""
        if asked := self._saved or self._asked_anywhere(trainer):
            if not self._saved and trainer.global_step:
                trainer.save_checkpoint(self.path)
            raise Stopped(asked)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep what a checkpoint of the first batch would hold: what resumes from it begins the evaluation anew."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        asked = self._saved or self._asked_anywhere(trainer)
        # It holds references to what no evaluation changes, so it costs nothing; elsewhere it is a collection.
        if batch_idx == 0 and (asked or isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)):
            begun = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            # Lightning makes an evaluation anew that stopped in a batch, and counts one as started after this hook.
            progress = begun["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for count in (progress["total"], progress["current"]):
                count["started"] = count["ready"]
            self._evaluation_begun = begun
        if asked:
            raise Stopped(asked)
        self._evaluating = self._alone

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Let what follows be done before the run ends."""
        self._evaluating = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the beginning of the evaluation."""
        self._evaluation_begun = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._listening.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the weights of before a step that could not be made, and say how to go on."""
        self._listening.close()
        if isinstance(exception, NonFiniteStepError | StoppedWaiting):
            trainer.save_checkpoint(self.path)
        if isinstance(exception, KeyboardInterrupt) and self._evaluation_begun is not None:
            trainer.strategy.save_checkpoint(self._evaluation_begun, self.path)
        if isinstance(exception, NonFiniteStepError | KeyboardInterrupt) and self.path.is_file():
            resume = f"--resume auto, or with trainer.fit(..., ckpt_path={str(self.path)!r})"
            _say(f"Saved {self.path}. Go on with {resume}.")
            if isinstance(exception, Stopped):
                exception.told = True

    def _asked_anywhere(self, trainer: L.Trainer) -> int:
        """Agree with all processes on the signal that came to any of them, 0 where none came."""
        if not trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            return 0
        number = torch.tensor(self._asked or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _ask(self, number: int, frame: Any) -> None:
        first, self._asked = self._asked is None, number
        if not first or self._evaluating:
            raise Stopped(number)
        if self._alone:
            put_off(number)
        _say("Interrupted: finishing this step, then saving. Press Ctrl-C again to stop at once.")


@rank_zero_only
def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
