"""Ctrl-C and SIGTERM: who answers them, and how."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (int(signal.SIGINT), int(signal.SIGTERM))


def ignore_signals(_: int = 0) -> None:
    """For loader workers: a signal to the process group is the main process's to answer."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM; gives a function that says whether one has come.

    A second one stops at once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may catch signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
