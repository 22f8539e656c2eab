"""Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM; gives a function that says whether one has come."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may catch signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    numbers = (int(signal.SIGINT), int(signal.SIGTERM))
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
