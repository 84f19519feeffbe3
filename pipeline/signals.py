"""SIGINT and SIGTERM end a command cleanly, and within ten seconds whatever it is doing."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ending workers and a cluster of its own takes a process two or three seconds.
_SECONDS_TO_END = 8.0


class Stopped(SystemExit):
    """A signal ended the command; the exit code is 128 plus its number."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(128 + number)
        self.number, self.advice = number, advice

    def __str__(self) -> str:
        how = "interrupted" if self.number == signal.SIGINT else "terminated"
        return f"editfleet: {how}; {self.advice}"


@contextmanager
def raising_stopped(advice: str) -> Iterator[None]:
    """Raise `Stopped` in the block on SIGINT or SIGTERM; end the process if it does not end then.

    What it is writing is whole or not listed even so, and workers end with their driver. Outside
    the main thread, which alone gets signals, this does nothing.

    Args:
        advice: what the user is told about what is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    raised: list[Stopped] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped = Stopped(number, advice)
        raised.append(stopped)
        watchdog = threading.Timer(_SECONDS_TO_END, _end, (stopped,))
        watchdog.daemon = True
        watchdog.start()
        raise stopped

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except SystemExit as error:
        # Waiting for an object, Ray catches what a handler raises and exits with 1 in its place.
        if raised and error is not raised[-1]:
            raise raised[-1] from error
        raise
    finally:
        for number, handler in before.items():
            # None is a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end(stopped: Stopped) -> None:
    print(stopped, file=sys.stderr, flush=True)
    os._exit(128 + stopped.number)
