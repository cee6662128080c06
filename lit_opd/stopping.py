"""Turn the signals that ask a process to stop into one exception, which ends it in order.

Why here: SIGTERM and SIGHUP would end a process where it is, with an MLflow run that stays RUNNING, and Lightning lets
one pass in an evaluation. The command line heeds signals for all commands, and `SaveOnInterrupt` while it trains.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

__all__ = ["Stopped", "StoppedWaiting", "as_raised", "end_wait", "heeding", "put_off"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FIRST_PROCESS = "LIT_OPD_FIRST_PROCESS"  # of a run, in the environment of those that it starts
AGAIN_S = 5.0  # so long what comes is the same signal: a terminal sends it to every process of a run


class Stopped(KeyboardInterrupt):
    """A signal that asked the process to stop.

    It is `told` once somebody has said what became of the work.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code, self.told = 128 + number, False


class StoppedWaiting(Stopped):
    """A signal that ended a wait in which nothing had changed, so that what was before it can be saved."""


_put_off: list[int] = []  # signals that are followed when the work under way is done


def put_off(number: int) -> None:
    """Keep a signal for the end of the work under way, or for a wait in it that may last."""
    _put_off.append(number)


def end_wait() -> None:
    """Follow a signal that was put off, from a wait that may last and in which nothing has changed.

    Raises:
        StoppedWaiting: there is one.
    """
    if _put_off:
        raise StoppedWaiting(_put_off[0])


@contextmanager
def heeding(handler: Callable[[int, Any], object] | None = None) -> Iterator[None]:
    """Have a handler called at every signal that asks to stop, but for one that the process ignores, as under `nohup`.

    Outside of the main thread, where Python has no signals, nothing changes.

    Args:
        handler: by default one that raises `Stopped` wherever the main thread is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _raising() if handler is None else handler
    # A shell has its background jobs ignore Ctrl-C, and they are to be stopped by it all the same.
    heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        _put_off.clear()
        for number, former in previous.items():
            signal.signal(number, former)


def _raising() -> Callable[[int, Any], None]:
    """Make the handler that raises `Stopped`.

    A process that the first one of a run started passes the signal on to it: ended alone, it would have Lightning kill
    the first, which could tell nobody. The first ends all.
    """
    last = -AGAIN_S

    def stop(number: int, frame: Any) -> None:
        nonlocal last
        if (first := _first()) is not None:
            os.kill(first, number)
        elif monotonic() - last >= AGAIN_S:
            last = monotonic()
            raise Stopped(number)

    if _first() is None:
        os.environ[FIRST_PROCESS] = str(os.getpid())
    return stop


def _first() -> int | None:
    """Find the first process of a run, where it is another one and started this one."""
    parent = os.getppid()
    started = os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get(FIRST_PROCESS) == str(parent)
    return parent if started else None


@contextmanager
def as_raised() -> Iterator[None]:
    """Raise again the interrupt that Lightning turns into SystemExit."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise
