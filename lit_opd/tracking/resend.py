"""Send MLflow what runs kept for it while it was away.

Why here: a run that ends before MLflow is back leaves files behind. The command `sync` calls it.
"""

from __future__ import annotations

from pathlib import Path

from lit_opd.errors import RunError, UserError, concealed
from lit_opd.tracking.store import KEPT, open_store

__all__ = ["send_kept"]


def send_kept(uri: str, folder: Path) -> None:
    """Make the calls that are kept in the folder of a run, in their order.

    Raises:
        UserError: nothing is kept there.
        RunError: some could not be made, and stay.
    """
    files = sorted((folder / KEPT).glob("*.*.jsonl"))
    if not files:
        expected = "the folder of a run that kept something for MLflow"
        raise UserError("output_dir", expected, repr(str(folder)), "There is nothing to do.")
    for run_id in {file.name.split(".")[0] for file in files}:
        mailbox = open_store(uri, folder)
        mailbox.open(run_id)
        if not mailbox.close():
            raise RunError(f"tracking.uri: MLflow at {concealed(uri)} took a part, and what is left stays in {folder}")
