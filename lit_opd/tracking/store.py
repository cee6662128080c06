"""Reach an MLflow store: check its address before anything is loaded, and read the runs it holds.

Why here: `compare` reads and groups runs through MLflow's own client, whose names it gets from this room.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lit_opd.errors import RunError, UserError, concealed
from lit_opd.tracking.fitting import RunClient
from lit_opd.tracking.mailbox import Mailbox, answer_within, reason

__all__ = ["KEPT", "MlflowClient", "MlflowException", "MlflowRun", "check_tracking", "connect", "need_store",
           "open_store", "send_kept"]  # fmt: skip

KEPT = "unsent"  # the folder, in that of a run, of what MLflow did not get

ANSWER_S = 10  # for a server's answer, or a lock of a database


def bound_waiting() -> None:
    """Have MLflow give up a request in seconds, where its own 120 s and 7 tries are minutes, and without a traceback.

    What a run tells is tried again by its mailbox. MLflow's tries would make a run twice whose first answer got lost.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the password that is in it
    # It logs every error of a database with its traceback, and then raises it.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def need_store(uri: str | None, wish: str) -> str:
    """Refuse null where a `wish` of the user needs an MLflow store."""
    if uri is None:
        remedy = "Set it to the store of the runs, as tracking.uri=sqlite:///mlflow.db."
        raise UserError("tracking.uri", f"an MLflow store, which is needed to {wish}", "null", remedy)
    return uri


def check_tracking(uri: str | None, begun: bool = False) -> None:
    """Refuse in seconds a tracking URI that cannot answer, where MLflow itself would retry for minutes.

    A run that is in the store already, as `begun` says, goes on where a server does not answer.
    """
    if uri is None:
        return
    bound_waiting()
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            answer_within(2 * ANSWER_S, lambda: MlflowClient(uri).search_experiments(max_results=1))
        except Exception as error:  # whatever a server may answer that is none of MLflow
            if begun and parts.hostname:
                return
            found, remedy = f"{uri!r}: {reason(error)}", "Start the server, or set tracking.uri=sqlite:///mlflow.db."
            raise UserError("tracking.uri", "an MLflow server that answers", found, remedy) from error
    elif parts.scheme == "sqlite":
        _check_database(Path(parts.path[1:]).expanduser())
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks", "file"):
        raise UserError("tracking.uri", "sqlite:///FILE, http://HOST:PORT or a database URI", repr(uri), "Correct it.")


def _check_database(file: Path) -> None:
    if not file.parent.is_dir():
        expected = "a database in an existing folder"
        raise UserError("tracking.uri", expected, f"no folder {str(file.parent)!r}", "Make it.")
    try:
        if not os.access(file.parent, os.W_OK):  # SQLite writes its journal there
            raise PermissionError(f"the folder {str(file.parent)!r} may not be written to")
        if file.exists():
            address = f"file:{urllib.parse.quote(str(file))}?mode=rw"
            with closing(sqlite3.connect(address, timeout=ANSWER_S, isolation_level=None, uri=True)) as held:
                held.execute("BEGIN IMMEDIATE")
                held.execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        expected = "an SQLite database that can be written to, or a new file"
        raise UserError("tracking.uri", expected, f"{str(file)!r}: {error}", "Name another file.") from error


def connect(uri: str, again: bool) -> RunClient:
    """Make the client of a run, of which an earlier process may have told `again`."""
    bound_waiting()
    mlflow.set_tracking_uri(uri)
    with first_in(uri):
        _make_tables(uri)
        return RunClient(uri, again)


def open_store(uri: str, folder: Path) -> Any:
    """Open a store with what `MlflowClient` does, behind a mailbox that keeps in a folder what MLflow does not get."""
    return Mailbox(lambda: connect(uri, again=True), uri, folder / KEPT)


def send_kept(uri: str, folder: Path) -> None:
    """Make the calls that the runs of a folder kept while MLflow was away, in their order.

    None kept is a `UserError`. Where some cannot be made they stay, which is a `RunError`.
    """
    run_ids = {file.name.split(".")[0] for file in (folder / KEPT).glob("*.*.jsonl")}
    if not run_ids:
        expected = "the folder of a run that kept something for MLflow"
        raise UserError("output_dir", expected, repr(str(folder)), "There is nothing to do.")
    mailbox = open_store(uri, folder)
    for run_id in run_ids:
        mailbox.open(run_id)
    if not mailbox.close():
        raise RunError(f"tracking.uri: MLflow at {concealed(uri)} took a part, and what is left stays in {folder}")


@contextmanager
def first_in(uri: str) -> Iterator[None]:
    """Let one process at a time make the tables of an SQLite database.

    MLflow (3.17) has two migrate a new file at once, and one of them fails on a table that the other has made.
    """
    folder = Path(urllib.parse.urlsplit(uri).path[1:]).parent
    if not uri.startswith("sqlite:///") or not folder.is_dir():
        yield
        return
    # The folder, for a lock file would stay behind, and SQLite has locks of its own on the database.
    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(place, fcntl.LOCK_EX)  # as long as the mailbox lets the call wait that connects
        yield
    finally:
        os.close(place)


def _make_tables(uri: str) -> None:
    """Make a new SQLite database beside its place, and move it there.

    MLflow (3.17) makes the tables in many steps, and fails for ever on a database whose making was killed.
    """
    file = Path(urllib.parse.urlsplit(uri).path[1:])
    if not uri.startswith("sqlite:///") or ":" in file.name or file.exists() or not file.parent.is_dir():
        return
    beside = file.with_name(f"{file.name}.new")  # a folder, for SQLite has files of its own beside a database
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir()
    try:
        MlflowClient(f"sqlite:///{beside / file.name}")
        os.replace(beside / file.name, file)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
