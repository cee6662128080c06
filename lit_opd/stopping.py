"""Turn the signals that ask a process to stop into one exception, which ends it in order.

Why here: SIGTERM and SIGHUP would end a process where it is, with an MLflow run that stays RUNNING, and Lightning lets
one pass in an evaluation. The command line heeds signals for all commands, and `SaveOnInterrupt` while it trains.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "as_raised", "heeding"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal that asked the process to stop.

    It is `told` once somebody has said what became of the work.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code, self.told = 128 + number, False


def _stop(number: int, frame: Any) -> None:
    """Raise `Stopped` wherever the main thread is, as a handler of a signal."""
    raise Stopped(number)


@contextmanager
def heeding(handler: Callable[[int, Any], object] = _stop) -> Iterator[None]:
    """Have a handler called at every signal that asks to stop, but for one that the process ignores, as under `nohup`.

    Outside of the main thread, where Python has no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell has its background jobs ignore Ctrl-C, and they are to be stopped by it all the same.
    heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


@contextmanager
def as_raised() -> Iterator[None]:
    """Raise again the interrupt that Lightning turns into SystemExit."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise
