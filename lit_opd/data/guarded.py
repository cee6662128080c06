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
FREE = ("exact", "last_number")  # which are rehearsed on all rows
CALL = "It is called as verifier(completion, row), and finds the answer in row['...'], by its column."


class _TooLong(BaseException):
    """Raised by the timer; no Exception, which a verifier may catch."""


class _NoReward(Exception):
    """What a verifier returned is no reward."""


class Guarded:
    """A verifier whose errors end a run in one line, or are rewards of 0 and counted.

    Args:
        verify: called as `verify(completion, row)`.
        config: its `verifier_seconds`, `on_verifier_error` and `answer_column`.
        name: as in `config.verifier`; None for a function that was given.

    """

    def __init__(self, verify: Verifier, config: DataConfig, name: str | None = None) -> None:
        self.verify, self.config, self.name = verify, config, name or getattr(verify, "__qualname__", repr(verify))
        self.own = name is None or ":" in name
        self.failed: list[bool] = []
        self.told = False

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Give the reward.

        Raises:
            RunError: the verifier fails, and `on_verifier_error` is `stop`.
        """
        stops = self.config.on_verifier_error == "stop"
        try:
            reward = self.ask(completion, row)
            self.failed += [] if stops else [False]
            return reward
        except UserError as error:
            if stops:
                raise RunError(str(error)) from error
            self.failed.append(True)
            if not self.told:
                self.told = True
                rank_zero_warn(str(error), category=LintWarning)
            return 0.0

    def ask(self, completion: str, row: Mapping[str, Any]) -> float:
        """Ask the verifier.

        Raises:
            UserError: it raises, takes too long, or returns no number from 0 to 1; with the row and the text.
        """
        try:
            with _time_limit(self.config.verifier_seconds):
                reward = self.verify(completion, row)
            return _as_reward(reward)
        except UserError:
            raise
        except (Exception, SystemExit, _TooLong) as error:  # whatever the user's function does
            cause = str(error) if isinstance(error, (_NoReward, _TooLong)) else f"{type(error).__name__}: {error}"
            found = f"{cause} for the completion {completion!r:.80} of row {dict(row)!r:.200}"
            stops = self.config.on_verifier_error == "stop"
            remedy = f"{CALL} {'Or set data.on_verifier_error=zero.' if stops else 'The reward is 0, and counted.'}"
            raise UserError("data.verifier", f"a number from 0 to 1 from {self.name}", found, remedy) from error

    def rehearse(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Judge the own answers of the first rows and an empty text, and tell what cannot be meant.

        Raises:
            UserError: it fails on them, or takes the row for the answer.
        """
        column, own, empty, watched = self.config.answer_column, [], [], _Row({})
        for row in rows if self.name in FREE else rows[:REHEARSED]:
            watched = _Row(row)
            empty.append(self._rehearse("", watched))
            answer = None if column is None else row.get(column)
            if answer is not None:
                own.append(self._rehearse(str(answer), watched))
        if not self.own:
            return
        if own and not any(own):
            found = f"0 from {self.name} for the answer in column {column!r} itself, in the first {len(own)} rows"
            if watched.taken_as_text:
                raise UserError("data.verifier", "a function that reads the row", f"{found}: it compares the row", CALL)
            rank_zero_warn(f"data.verifier: {found}. Is more than the answer wanted? {CALL}", category=LintWarning)
        if empty and min(empty) == 1:
            told = f"1 from {self.name} for an empty text, in the first {len(empty)} rows. {CALL}"
            rank_zero_warn(f"data.verifier: {told}", category=LintWarning)

    def failures(self) -> list[bool]:
        """Tell of each reward since the last call whether it is an error's; nothing where errors end the run."""
        failed, self.failed = self.failed, []
        return failed

    def _rehearse(self, completion: str, row: _Row) -> float:
        try:
            return self.ask(completion, row)
        except UserError:
            if completion or self.config.on_verifier_error == "stop":
                raise
            return 0.0


def tell_constant(teacher: Mapping[str, Any]) -> None:
    """Warn where the teacher, by its results, is right on all held-out prompts or on none, seldom by its merit."""
    accuracy = teacher["accuracy"].mean if "accuracy" in teacher else None
    if accuracy in (0, 1):
        judged = "no completion of the teacher" if accuracy == 0 else "every completion of the teacher"
        cause = "Look at completions.json: the verifier may read them otherwise than they are written"
        remedy = f"{cause}, or rollout.max_new_tokens may cut them off." if accuracy == 0 else f"{cause}."
        rank_zero_warn(f"data.verifier: {judged} is right on held-out prompts. {remedy}", category=LintWarning)


class _Row(dict[str, Any]):
    """A row that notices when it is compared, searched or printed as if it were the answer, and none of it read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.read = self.used = False

    @property
    def taken_as_text(self) -> bool:
        return self.used and not self.read

    def __getitem__(self, key: str) -> Any:
        self.read = True
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read = True
        return super().get(key, default)

    def __eq__(self, other: object) -> bool:
        self.used = True
        return super().__eq__(other)

    def __contains__(self, key: object) -> bool:
        self.used = True
        return super().__contains__(key)

    def __repr__(self) -> str:
        self.used = True
        return super().__repr__()

    __hash__ = None


def _as_reward(reward: Any) -> float:
    if reward is None or isinstance(reward, str):
        raise _NoReward(f"{reward!r:.80}")
    value = float(reward)
    if not 0 <= value <= 1:
        raise _NoReward(f"{reward!r:.80}")
    return value


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_TooLong` inside after so many seconds, by a signal, which only the main thread may set."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong(f"nothing within {seconds:g} s (data.verifier_seconds)")

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        if left:  # somebody else's timer was running
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)
