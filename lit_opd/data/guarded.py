"""Ask a verifier so that none can spoil a run: within a time limit, for a number from 0 to 1, rehearsed on first rows.

Why here: verifiers are the user's, and what they return goes into accuracies and gradients. The data module puts every
verifier into a `Guarded`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_opd.config import DataConfig
from lit_opd.errors import LintWarning, RunError, UserError

__all__ = ["Guarded", "Verifier", "tell_constant"]

Verifier = Callable[[str, Mapping[str, Any]], float]

REHEARSED = 4  # rows, because a verifier may ask a model and be paid for
READING = {"__getitem__", "get"}  # methods of a row
FREE = ("exact", "last_number")  # which are rehearsed on all rows
CALL = "It is called as verifier(completion, row), and finds the answer in row['...'], by its column."


class _Failure(BaseException):
    """Stand for what a verifier did instead of giving a reward. It is no Exception, which the verifier may catch."""


class Guarded:
    """A verifier whose errors end a run in one line, or are rewards of 0 and counted.

    Args:
        verify: called as `verify(completion, row)`.
        config: its `verifier_seconds`, `on_verifier_error` and `answer_column`.
        name: as in `config.verifier`; None for a function that was given.
    """

    def __init__(self, verify: Verifier, config: DataConfig, name: str | None = None) -> None:
        self.verify, self.config, self.name = verify, config, name or getattr(verify, "__qualname__", repr(verify))
        self.own, self.stops = name is None or ":" in name, config.on_verifier_error == "stop"
        self.failed: list[bool] = []
        self.told = False

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Give the reward.

        Raises:
            RunError: the verifier fails, and `on_verifier_error` is `stop`.
        """
        reward, error = 0.0, None
        try:
            reward = self.ask(completion, row)
        except UserError as raised:
            error = raised
        if error and self.stops:
            raise RunError(str(error)) from error
        if error and not self.told:
            rank_zero_warn(str(error), category=LintWarning)
        self.told = self.told or error is not None
        self.failed += [] if self.stops else [error is not None]
        return reward

    def ask(self, completion: str, row: Mapping[str, Any]) -> float:
        """Ask the verifier.

        Raises:
            UserError: it raises, takes too long, or returns no number from 0 to 1; with the row and the text.
        """
        try:
            with _time_limit(self.config.verifier_seconds):
                reward: Any = self.verify(completion, row)
            if reward is None or isinstance(reward, str) or not 0 <= float(reward) <= 1:
                raise _Failure(f"{reward!r:.80}")
            return float(reward)
        except UserError:
            raise
        except (Exception, SystemExit, _Failure) as error:  # whatever the user's function does
            cause = str(error) if isinstance(error, _Failure) else f"{type(error).__name__}: {error}"
            found = f"{cause} for the completion {completion!r:.80} of row {dict(row)!r:.200}"
            remedy = (
                f"{CALL} {'Or set data.on_verifier_error=zero.' if self.stops else 'The reward is 0, and counted.'}"
            )
            raise UserError("data.verifier", f"a number from 0 to 1 from {self.name}", found, remedy) from error

    def rehearse(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Judge the own answers of the first rows and an empty text, and tell what cannot be meant.

        Raises:
            UserError: it fails on them, or takes the row for the answer.
        """
        column, ask = self.config.answer_column, self.ask if self.stops else self
        tried = [_Row(row) for row in (rows if self.name in FREE else rows[:REHEARSED])]
        empty = [ask("", row) for row in tried]
        answers = [None if column is None else dict.get(row, column) for row in tried]
        own = [self.ask(str(answer), row) for answer, row in zip(answers, tried, strict=True) if answer is not None]
        self.failed = []
        used = set().union(*(row.used_by for row in tried))
        found = f"data.verifier: {{}} from {self.name} for {{}}, in the first {len(tried)} rows. {CALL}"
        if used and not used & READING and not any(own + empty):
            raise UserError("data.verifier", "a function that reads the row", f"{self.name}, which compares it", CALL)
        if self.own and own and not any(own):
            rank_zero_warn(found.format(0, f"the answer in column {column!r} itself"), category=LintWarning)
        if self.own and empty and min(empty) == 1:
            rank_zero_warn(found.format(1, "an empty text"), category=LintWarning)
        if absent := set.intersection(*(row.absent for row in tried)) if tried else set():
            told = f"data.verifier: {self.name} asks for columns that none of the first {len(tried)} rows has: "
            rank_zero_warn(told + ", ".join(sorted(map(repr, absent))), category=LintWarning)

    def failures(self) -> list[bool]:
        """Tell of each reward since the last call whether it is an error's, or nothing where errors end the run."""
        failed, self.failed = self.failed, []
        return failed


def tell_constant(teacher: Mapping[str, Any]) -> None:
    """Warn where the teacher, by its results, is right on all held-out prompts or on none, seldom by its merit."""
    if "accuracy" in teacher and teacher["accuracy"].mean in (0, 1):
        told = f"the teacher's accuracy on held-out prompts is {teacher['accuracy'].mean:g}. Look at completions.json: "
        told += "the verifier may read them otherwise than they are written, or rollout.max_new_tokens cut them off."
        rank_zero_warn(f"data.verifier: {told}", category=LintWarning)


class _Row(dict[str, Any]):
    """A row that notes by which methods it is used: those that read it, or those that take it for the answer."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.used_by: set[str] = set()
        self.absent: set[Any] = set()


def _noting(name: str) -> Callable[..., Any]:
    def method(self: _Row, *arguments: Any) -> Any:
        self.used_by.add(name)
        if name in READING and not dict.__contains__(self, arguments[0]):
            self.absent.add(arguments[0])
        return getattr(dict, name)(self, *arguments)

    return method


for _name in (*READING, "__eq__", "__contains__", "__repr__", "__len__", "__iter__"):
    setattr(_Row, _name, _noting(_name))


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_Failure` inside after so many seconds, by a signal, which only the main thread may set."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _Failure(f"nothing within {seconds:g} s (data.verifier_seconds)")

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        if left:  # somebody else's timer was running
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)
