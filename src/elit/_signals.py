"""Ctrl-C and SIGTERM: who answers them, and how."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

STOPS = (int(signal.SIGINT), int(signal.SIGTERM))


def ignore_signals(_: int = 0) -> None:
    """For loader workers: a signal to the process group is the main process's to answer."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _answered_by(handle: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    """Signals handled so meanwhile, in the main thread, which alone may do this."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM; gives a function that says whether one has come.

    A second one stops at once.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPS}

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, before[number])

    with _answered_by(handle, *STOPS):
        yield lambda: bool(received)


def ends_on_sigterm() -> AbstractContextManager[None]:
    """SIGTERM, which Slurm and torchrun send, ends the run as Ctrl-C does."""
    return _answered_by(signal.default_int_handler, signal.SIGTERM)
