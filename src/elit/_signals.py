"""Signals that are another process's to answer."""

import signal


def ignore_signals(_: int = 0) -> None:
    """For loader workers: a signal to the process group is the main process's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
