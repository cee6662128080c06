"""Reach an MLflow store: check its address before anything is loaded, and read the runs it holds.

Why here: `compare` reads and groups runs through MLflow's own client, whose names it gets from this room.
"""

from __future__ import annotations

import socket
import urllib.parse
from pathlib import Path

from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lit_opd.errors import UserError

__all__ = ["MlflowClient", "MlflowException", "MlflowRun", "check_tracking"]

# The first bytes of every SQLite file.
SQLITE = b"SQLite format 3\0"


def check_tracking(uri: str) -> None:
    """Find out in seconds whether a tracking URI can answer, where MLflow itself would retry for minutes.

    Raises:
        UserError: an unknown kind of URI, a server that does not answer, a folder that does not exist.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
        except (OSError, ValueError) as error:
            remedy = "Start the server, or set tracking.uri=sqlite:///mlflow.db."
            raise UserError("tracking.uri", "an MLflow server that answers", f"{uri!r}: {error}", remedy) from error
    elif parts.scheme == "sqlite":
        _check_database(Path(uri.removeprefix("sqlite:///")).expanduser())
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks", "file"):
        raise UserError("tracking.uri", "sqlite:///FILE, http://HOST:PORT or a database URI", repr(uri), "Correct it.")


def _check_database(file: Path) -> None:
    if not file.parent.is_dir():
        expected = "a database in an existing folder"
        raise UserError("tracking.uri", expected, f"no folder {str(file.parent)!r}", "Make it.")
    if file.is_dir() or (file.is_file() and file.stat().st_size and file.open("rb").read(len(SQLITE)) != SQLITE):
        found, remedy = f"{str(file)!r}, which is another thing", "Name another file."
        raise UserError("tracking.uri", "an SQLite database or a new file", found, remedy)
