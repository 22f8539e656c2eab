"""One thread at a time with a module."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

logger = logging.getLogger(__name__)

PATIENCE = 60  # seconds, before a thread that waits says so

_LOCKS: "weakref.WeakKeyDictionary[Any, RLock]" = weakref.WeakKeyDictionary()


@contextmanager
def alone_with(module: Any) -> Iterator[None]:
    """Let other threads that come here with the module wait until this one leaves."""
    module = getattr(module, "_orig_mod", module)  # of a compiled one
    lock = _LOCKS.setdefault(module, RLock())
    if not lock.acquire(timeout=PATIENCE):
        logger.warning(
            "this thread has waited %d s for another one that uses the %s; within at_budget, call "
            "it in the thread that entered at_budget", PATIENCE, type(module).__name__,
        )  # fmt: skip
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
