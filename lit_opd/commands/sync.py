"""Send MLflow what a run could not tell it.

The command line calls it for `sync`: a run goes on while MLflow is away, and may end before it is back.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.files import only_one
from lit_opd.tracking import check_tracking, need_store, send_kept
from lit_opd.tracking.store import KEPT

__all__ = ["sync"]


def sync(config: Config) -> None:
    """Send what is kept in `output_dir`, and say so, unless a run is at work there."""
    quiet_libraries()
    uri = need_store(config.tracking.uri, "send it what a run kept")
    check_tracking(uri)
    folder = Path(config.output_dir)
    # A run at work there sends it itself. Where nothing is kept no lock is made.
    with only_one("output_dir", folder) if (folder / KEPT).is_dir() else nullcontext():
        send_kept(uri, folder)
    print(f"MLflow has got all that {config.output_dir} kept for it.")
