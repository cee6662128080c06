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

__all__ = ["Stopped", "as_raised", "heed", "heeding"]

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


def heed(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have a handler called at every signal that asks to stop, but for one that the process ignores, as under `nohup`.

    Returns:
        The handlers before, by signal; none outside of the main thread, where Python has no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    # A shell has its background jobs ignore Ctrl-C, and they are to be stopped by it all the same.
    heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


@contextmanager
def heeding() -> Iterator[None]:
    """Raise `Stopped` wherever the main thread is when a signal asks it to stop.

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
    previous = heed(stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
