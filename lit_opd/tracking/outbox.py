"""Send a run's calls to MLflow in their order, and keep in a file those that cannot be sent.

Why here: no tracker is worth a run. `Mailbox` has two of these, one for files, so that a broken store of artifacts
holds back no metric.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from mlflow import entities

from lit_opd.errors import concealed

__all__ = ["Call", "Outbox", "Refused"]

Call = dict[str, Any]  # of values that JSON can hold: the name under `call`, and the arguments
PAUSE_S = 5.0  # between a try that failed and the next, at least
SHARE = 10  # a slow or hanging tracker takes no more than one second in so many
SLOW_S = 1.0  # a call that takes longer has those after it wait
CATCH_UP_S = 2.0  # how long what was kept may hold up one step of a run


class Refused(Exception):
    """The tracker answers, and will never take this call."""


class Outbox:
    """Makes calls, or keeps them in a file until they can be made.

    Args:
        make: makes a call, and raises `Refused`, or whatever else went wrong.
        file: where to keep calls; it is there as long as some wait, also those of an earlier process. What was refused
            is put aside in `refused.jsonl` beside it.
        tell: is told of what went wrong: the tracker is `away`, or it `refused` a call, a call is `lost`, or those kept
            in memory go `unkept` as long as the disk is full.
    """

    def __init__(self, make: Callable[[Call], None], file: Path, tell: Callable[[str, Exception], None]) -> None:
        self._make, self._file, self._tell = make, file, tell
        self.unwritten: list[str] = []  # what a full disk does not take
        self._sent, self._next_try = 0, 0.0

    @property
    def waiting(self) -> bool:
        """True where calls wait to be made."""
        return bool(self.unwritten) or self._file.is_file()

    def post(self, call: Call) -> None:
        """Make a call after those that wait, or keep it."""
        if self.waiting and monotonic() >= self._next_try:
            self.catch_up(CATCH_UP_S)
        if self.waiting or monotonic() < self._next_try or not self._try(call):
            self.unwritten += self._encoded(call)
            self._write()

    def catch_up(self, seconds: float = math.inf) -> None:
        """Make calls that wait, until one fails or the time is over."""
        end = monotonic() + seconds
        self._write()
        if self._file.is_file():
            with self._file.open("rb") as file:
                file.seek(self._sent)
                for line in file:
                    if monotonic() > end or not self._send(line.decode()):
                        return
                    self._sent += len(line)
            self._file.unlink()
            self._sent = 0
        while self.unwritten and monotonic() <= end and self._send(self.unwritten[0]):
            self.unwritten.pop(0)

    def _send(self, line: str) -> bool:
        try:
            call = json.loads(line, object_hook=_entity)
        except ValueError:  # an empty line, or one that a full disk or a kill cut off
            return True
        return self._try(call)

    def _try(self, call: Call, once_more: bool = True) -> bool:
        began = monotonic()
        try:
            self._make(call)
        except Refused as error:
            if lines := self._encoded(call):
                self._append("refused.jsonl", lines)
            self._tell("refused", error)
        except Exception as error:  # whatever MLflow passes on of its database, its server and its store of artifacts
            if once_more and monotonic() - began < SLOW_S:  # servers close connections that were idle for a while
                return self._try(call, once_more=False)
            self._tell("away", error)
            self._next_try = monotonic() + max(PAUSE_S, SHARE * (monotonic() - began))
            return False
        took = monotonic() - began
        self._next_try = monotonic() + SHARE * took if took > SLOW_S else 0.0
        return True

    def _write(self) -> None:
        """Write what is not in the file yet, and keep it in memory where the disk is full too."""
        if self.unwritten and self._append(self._file.name, self.unwritten):
            self.unwritten.clear()

    def _append(self, name: str, lines: Sequence[str]) -> bool:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.with_name(name).open("a") as file:
                # A line break first: the line before may have been cut off.
                file.write("\n" + "\n".join(lines) + "\n")
        except OSError as error:
            self._tell("unkept", error)
            return False
        return True

    def _encoded(self, call: Call) -> list[str]:
        """Write a call as a line of JSON, none where it holds an object of the user's that JSON cannot hold."""
        try:
            return [_encoded(call)]
        except (TypeError, ValueError, OSError) as error:
            self._tell("lost", error)
            return []


def _encoded(call: Call) -> str:
    """Write a call as a line of JSON, with the content of the files that it names."""
    if call["call"] in ("log_artifact", "log_artifacts"):
        place = Path(call.get("local_path") or call["local_dir"])
        files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
        root = place if place.is_dir() else place.parent
        kept = {str(file.relative_to(root)): base64.b64encode(file.read_bytes()).decode() for file in files}
        call = {**call, "call": "log_artifacts", "local_dir": kept}
        call.pop("local_path", None)
    return concealed(json.dumps(call, default=lambda value: {"entity": type(value).__name__, "of": dict(value)}))


def _entity(held: dict[str, Any]) -> Any:
    """Make an entity of MLflow again of what `_encoded` wrote for one."""
    return getattr(entities, held["entity"])(**held["of"]) if held.keys() == {"entity", "of"} else held
