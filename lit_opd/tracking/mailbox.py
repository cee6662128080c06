"""Stand between a run and MLflow's client, so that no call of it costs the run its life or its time.

Why here: a server dies, hangs or is restarted, a database is locked, a run is deleted while it trains. The `experiment`
of a `RunLogger` is one of these, so everything that talks to MLflow does so through it.
"""

from __future__ import annotations

import base64
import inspect
import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock, Thread
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException
from tqdm import tqdm

from lit_opd.errors import RunError, concealed
from lit_opd.tracking.fitting import RunClient
from lit_opd.tracking.outbox import Call, Outbox, Refused

__all__ = ["Mailbox", "answer_within", "message", "reason"]

LIMIT_S = 60.0  # for any call, an upload too; MLflow's own limits, of `bound_waiting`, are shorter and end most
HURRY_S = 5.0  # for the last calls of a run that is being killed
TELLING = ("log_", "set_", "update_", "delete_tag")  # calls whose answer nobody needs
FILES = ("log_artifact", "log_artifacts", "log_table")
MISSING = "RESOURCE_DOES_NOT_EXIST"
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", MISSING)
MESSAGES: dict[str, Callable[..., None]] = {}
T = TypeVar("T")


def message(function: Callable[..., None]) -> Callable[..., None]:
    """Let a mailbox make several calls as one, by the name of a function of the client that may be called twice."""
    MESSAGES[function.__name__] = function
    return function


def answer_within(seconds: float, work: Callable[[], T]) -> T:
    """Return what work returns, or raise TimeoutError and leave behind the thread that it runs in."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # nobody else would see it
            answer.set_exception(error)

    Thread(target=run, name="mlflow", daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def reason(error: BaseException) -> str:
    """Say in one line what was wrong at the bottom of a chain of errors."""
    while below := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = below
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return concealed(lines[0].strip())[:300]


class Mailbox:
    """MLflow's client for one run: every method of it, and every `message`.

    A call that changes something is made at once, or kept in `folder`, a file a run, and made when MLflow is back. A
    call that asks is answered, or raises `RunError`; where MLflow knows no such run it raises `MlflowException` as
    always. None takes longer than a minute, and where they fail, all together take a tenth of the time.
    """

    def __init__(self, connect: Callable[[], RunClient], uri: str, folder: Path) -> None:
        self._connect, self._uri, self._folder = connect, concealed(uri), folder
        self._client: RunClient | None = None
        self._boxes: dict[str, Outbox] = {}
        self._hurry, self._told = False, set[str]()
        self._lock = RLock()

    def __getattr__(self, name: str) -> Any:
        method = MESSAGES.get(name) or getattr(RunClient, name)
        if name in MESSAGES or name.startswith(TELLING):
            return partial(self._post, name, inspect.signature(method))
        return partial(self._ask, name) if callable(method) else self._ask(name)

    def open(self, run_id: str) -> None:
        """Take up what an earlier process kept of a run: it is sent before anything else."""
        for kind in ("calls", "files"):
            self._box(run_id, kind)

    def ask(self, work: Callable[[RunClient], T]) -> T:
        """Return what work on the client returns, or raise whatever went wrong, within a minute."""
        return answer_within(self._limit, lambda: work(self._connected()))

    def close(self, hurry: bool = False) -> bool:
        """Try once more to send what was kept, say where it is if that fails, and return whether all is sent."""
        with self._lock:
            self._hurry = hurry
            for box in self._boxes.values():
                box.catch_up(self._limit)
            left = any(box.waiting for box in self._boxes.values())
            if lost := sum(len(box.unwritten) for box in self._boxes.values()):
                where = f"which {self._folder} could not take either: they are lost."
                _say(f"MLflow lacks {lost} calls of this run, {where}")
            elif left:
                how = "`python -m lit_opd sync` with the same configuration sends it, as --resume auto does."
                _say(f"MLflow lacks a part of this run, kept in {self._folder}: {how}")
            elif "away" in self._told:
                _say("MLflow has got all that was kept for it.")
                self._told.discard("away")
            return not left

    @property
    def _limit(self) -> float:
        return HURRY_S if self._hurry else LIMIT_S

    def _connected(self) -> RunClient:
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _ask(self, name: str, *args: Any, **options: Any) -> Any:
        def work(client: RunClient) -> Any:
            held = getattr(client, name)
            return held(*args, **options) if callable(held) else held

        try:
            return self.ask(work)
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                raise
            raise RunError(f"tracking.uri: MLflow at {self._uri} does not answer {name}: {reason(error)}") from error

    def _post(self, name: str, signature: inspect.Signature, *args: Any, **options: Any) -> None:
        bound = signature.bind(None, *args, **options).arguments
        call = {"call": name, **dict(list(bound.items())[1:])}
        with self._lock:
            self._box(call.get("run_id"), "files" if name in FILES else "calls").post(call)

    def _box(self, run_id: str | None, kind: str) -> Outbox:
        file = self._folder / f"{run_id}.{kind}.jsonl"
        if file.name not in self._boxes:
            self._boxes[file.name] = Outbox(self._make, file, self._tell)
        return self._boxes[file.name]

    def _make(self, call: Call) -> None:
        try:
            answer_within(self._limit, lambda: _perform(self._connected(), call))
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            lost = self._what_is_lost(call.get("run_id"))
            if lost is not None:
                raise MlflowException(lost) from None
            if error.error_code == MISSING and "run_id" in call:
                raise  # the run is there: mlflow says so of every download that fails, be it of a busy database
            raise Refused(f"{call['call']}: {reason(error)}") from error

    def _what_is_lost(self, run_id: str | None) -> str | None:
        """Say what was deleted, where it is the run and not the call that is refused."""
        if run_id is None:
            return None
        try:
            info = self.ask(lambda client: client.get_run(run_id).info)
            where = self.ask(lambda client: client.get_experiment(info.experiment_id))
        except MlflowException as error:
            return f"run {run_id}: {reason(error)}"
        if where.lifecycle_stage == "deleted":
            restore = f"`mlflow experiments restore --experiment-id {where.experiment_id}`"
            return f"the experiment {where.name!r} was deleted ({restore} brings it back)"
        restore = f"`mlflow runs restore --run-id {run_id}`"
        return f"the run was deleted ({restore} brings it back)" if info.lifecycle_stage == "deleted" else None

    def _tell(self, kind: str, error: Exception) -> None:
        """Say the first time of each kind what went wrong and what becomes of it."""
        if kind in self._told:
            return
        self._told.add(kind)
        said = {
            "away": f"MLflow at {self._uri} fails: {reason(error)}. The run goes on; what it tells is kept in "
                    f"{self._folder}.",
            "refused": f"MLflow refuses {error}. The run goes on; what was refused is kept in "
                       f"{self._folder / 'refused.jsonl'}.",
            "lost": f"A call of MLflow could not be made and is lost: {reason(error)}. The run goes on.",
            "unkept": f"{self._folder} cannot be written to: {reason(error)}. The run goes on; what MLflow does not "
                      "get is kept in memory.",
        }  # fmt: skip
        _say(said[kind])


def _perform(client: RunClient, call: Call) -> None:
    arguments = {name: value for name, value in call.items() if name != "call"}
    if call["call"] in MESSAGES:
        MESSAGES[call["call"]](client, **arguments)
    elif isinstance(files := arguments.get("local_dir"), dict):
        with TemporaryDirectory() as folder:
            for name, content in files.items():
                (place := Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(content))
            client.log_artifacts(**arguments | {"local_dir": folder})
    else:
        getattr(client, call["call"])(**arguments)


def _say(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)  # on a line of its own, above the bar of the run
