"""Silence what other libraries print, so that what a run prints is what a user needs.

Every command that loads a model calls it first. In Python nothing is silenced.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_opd.linter import LintWarning

__all__ = ["quiet_libraries"]

# Lightning and Transformers warn of what is meant here: manual optimization, unequal ranks, a resumed run, a CPU.
EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*ModelCheckpoint.*manual optimization.*",
    r".*does not have many workers.*",
    r".*`weights_only` was not set.*",
    r".*is supported for historical reasons but its usage is discouraged.*",
    r".*The number of training batches.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*The dirpath has changed from .*",
    r".*`is_gradient_checkpointing` is deprecated.*",
    r".*recommended to use `self\.log\(.*sync_dist=True.*",  # of numbers that are the same in all processes already
    r".*module\(s\) in eval mode at the start of training.*",  # so that no dropout is in it
)


def quiet_libraries() -> None:
    """Keep warnings and errors of Lightning, MLflow and Transformers, and drop their chatter and progress bars."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler tells of every start and stop
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:  # which reads the variable above only when it is imported
        sys.modules["datasets"].disable_progress_bars()
    from transformers.utils import logging as transformers_logging

    import lit_opd.tracking  # noqa: F401  (MLflow sets up its own logging when imported, after which levels are set)

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    # huggingface_hub warns at every attempt to reach a hub that does not answer. The error in the end says it once.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _tell_findings()


def _tell_findings() -> None:
    """Print what the linter warns of once, in one line and on one process, and other warnings as before."""
    show_others = warnings.showwarning
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if not issubclass(category, LintWarning):
            show_others(message, category, *where, **options)
        elif getattr(rank_zero_only, "rank", 0) == 0 and str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    # Not Python's action "once": it forgets what it told when another library adds a filter of its own.
    warnings.simplefilter("always", LintWarning)
    warnings.showwarning = show
