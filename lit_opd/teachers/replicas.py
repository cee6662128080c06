"""Ask servers that answer alike, and go on asking while they are away.

`ServedScorer` sends its requests here. A server that is busy, restarts or breaks off is asked again, with longer and
longer pauses. One that refuses a request is not: its words become the message.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import cycle
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import urllib3

from lit_opd.config import TeacherConfig
from lit_opd.errors import LintWarning, UserError, keep_secret
from lit_opd.stopping import end_wait

__all__ = ["Asked", "Refusal", "Replicas"]

BUSY = {408, 425, 429, 500, 502, 503, 504}  # what a server answers that may answer otherwise a little later
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds
LONG_S = 2.0  # seconds without an answer after which a signal to stop is not put off any longer
LOOK = "Look at what the server prints."
START = "Start it with `vllm serve TEACHER`, or correct teacher.server."

Asked = tuple[str, dict[str, Any]]
"""The path of a request and its body."""


class Refusal(UserError):
    """An error of a server that understood a request and declined it."""


class Replicas:
    """The addresses of one served model, asked in turn.

    Args:
        config: the section of the teacher.

    Raises:
        UserError: `teacher.key_variable` names a variable that is not set.
    """

    def __init__(self, config: TeacherConfig) -> None:
        named = [config.server] if isinstance(config.server, str) else config.server
        self.addresses: list[str] = [one.rstrip("/") for one in named]
        self.patience_s, self.timeout_s, self.in_flight = config.patience_s, config.timeout_s, config.in_flight
        self._headers = {"Content-Type": "application/json"}
        if config.key_variable is not None:
            key = os.environ.get(config.key_variable)
            if not key:
                remedy = f"export {config.key_variable}=KEY first."
                raise UserError("teacher.key_variable", f"a key in ${config.key_variable}", "none", remedy)
            keep_secret(key, f"${config.key_variable}")
            self._headers["Authorization"] = f"Bearer {key}"
        self._pool = urllib3.PoolManager(len(self.addresses), maxsize=self.in_flight)
        self._turns, self._lock = cycle(self.addresses), Lock()
        self._waiting: SimpleQueue[tuple[Future[Any], Asked, str | None]] = SimpleQueue()
        self._started = 0
        self._away: set[str] = set()  # servers of which it was told that they give no answer

    def begin(self, asked: Asked, address: str | None = None) -> Future[Any]:
        """Send a request as soon as fewer than `in_flight` for each server are under way, and return at once."""
        answer: Future[Any] = Future()
        self._waiting.put((answer, asked, address))
        with self._lock:
            more = self._started < self.in_flight * len(self.addresses)
            self._started += more
        if more:
            # No thread of an executor: Python waits for these at its end, for as long as a server does not answer.
            Thread(target=self._work, name="teacher", daemon=True).start()
        return answer

    def ask_all(self, asked: Sequence[Asked], address: str | None = None) -> list[dict[str, Any]]:
        """Send several requests at once, to one address or to each in turn, and return their answers in order."""
        return self.answers([self.begin(one, address) for one in asked])

    def answers(self, begun: Sequence[Future[Any]]) -> list[dict[str, Any]]:
        """Wait for the answers to requests that have begun, in the main thread, where a signal may end the wait."""
        try:
            return [_wait_for(answer) for answer in begun]
        finally:
            for answer in begun:
                answer.cancel()  # where one of them failed, or the run is stopped

    def ask(self, path: str, body: dict[str, Any] | None = None, address: str | None = None) -> dict[str, Any]:
        """Send a request until a server answers: to one address, or to each in turn.

        Raises:
            Refusal: a server declined.
            UserError: none answered for `teacher.patience_s` seconds.
        """
        end, pause = time.monotonic() + self.patience_s, FIRST_PAUSE
        while True:
            server = address or self._next()
            try:
                answer = self._send(server, path, body)
                self._away.discard(server)
                return answer
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                found = f"{type(error).__name__}: {error}"[:200]
                if time.monotonic() + pause > end:
                    expected = f"an answer of {server} within {self.patience_s:g} s (teacher.patience_s)"
                    raise UserError("teacher.server", expected, found, START) from error
            if server not in self._away:  # once for all requests that wait for it
                self._away.add(server)
                told = f"teacher.server: {server} gave no answer ({found}). It is asked for {self.patience_s:g} s more."
                warnings.warn(told, LintWarning, stacklevel=2)
            time.sleep(pause * random.uniform(0.5, 1.0))  # apart from each other, that not all come at once
            pause = min(2 * pause, LONGEST_PAUSE)

    def _work(self) -> None:
        while True:
            answer, (path, body), address = self._waiting.get()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(self.ask(path, body, address))
            except BaseException as error:
                answer.set_exception(error)

    def _next(self) -> str:
        with self._lock:
            return next(self._turns)

    def _send(self, server: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request once."""
        data = None if body is None else json.dumps(body).encode()
        # urllib3 can send again by itself, but neither to another address nor for a length of time.
        answer = self._pool.request(
            "GET" if data is None else "POST", server + path, body=data, headers=self._headers,
            timeout=self.timeout_s, retries=False,
        )  # fmt: skip
        if answer.status in BUSY:
            raise ValueError(f"status {answer.status}: {_message(answer.data)}")
        if answer.status in (401, 403):
            expected, found = f"a key that {server} accepts", f"status {answer.status}"
            remedy = "Name the variable that holds the key in teacher.key_variable."
            raise UserError("teacher.key_variable", expected, found, remedy)
        if answer.status != 200:
            found = f"{answer.status}: {_message(answer.data)}"
            raise Refusal("teacher.server", f"an answer of {server}{path}", found, LOOK)
        return json.loads(answer.data)  # what a server broke off is no JSON, and a ValueError


def _wait_for(answer: Future[Any]) -> Any:
    while True:
        try:
            return answer.result(LONG_S)
        except TimeoutError:
            end_wait()


def _message(data: bytes) -> str:
    text = data.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
