"""Stand for the MLflow run of a run without MLflow: `tracking.uri=null`.

Commands hand it values as they do to a `RunLogger`, and MLflow hears nothing of them.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from lit_opd.tracking.run import RunLogger

__all__ = ["Unrecorded"]


class Unrecorded(RunLogger):
    """A logger that only has the other loggers of its run, and of a run that MLflow knew before, its id."""

    def __init__(self, run_id: str | None = None) -> None:
        Logger.__init__(self)
        self._initialized, self._run_id, self._experiment_id = False, run_id, None
        self.others, self.last_steps = [], {}

    @property
    def experiment(self) -> Any:
        """Answer nothing to any call."""
        return DummyLogger().experiment

    @property
    def loggers(self) -> list[Logger]:
        """The other loggers of the run."""
        return self.others

    def begin(self) -> None:
        """Begin nothing."""
