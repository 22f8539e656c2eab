"""Says on stderr what a command is at where it takes long: what it imports, and its stages."""

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

FIRST = "torch"  # said when its import begins: a thread would not run while it is loaded
PATIENCE = 2.0  # seconds for which nothing is said
MAIN = threading.main_thread()
_stages: list[tuple[str, float]] = []  # what the command is at, and since when


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Say this if it takes long: "loading runs/digits"."""
    _stages.append((text, time.monotonic()))
    try:
        yield
    finally:
        _stages.pop()


@contextlib.contextmanager
def telling_what_takes_long() -> Iterator[None]:
    """Watch over a command, the first of several processes alone."""
    if os.environ.get("RANK", "0") != "0" or threading.current_thread() is not MAIN:
        yield
        return
    watch = _Watch()
    sys.meta_path.insert(0, watch)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.done.set()
        thread.join()
        if watch.collects:
            gc.enable()
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(watch)


class _Watch:
    """Finds no module, but is asked for each; and looks what the main thread imports."""

    def __init__(self) -> None:
        self.done, self.said, self.last = threading.Event(), set[str](), time.monotonic()
        self.collects = gc.isenabled()

    def say(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.last = time.monotonic()
            print(f"elit: {text}", file=sys.stderr, flush=True)

    def find_spec(self, name: str, *_: Any) -> None:
        if name == FIRST:
            self.say(f"importing {name}")

    def run(self) -> None:
        imported, was = 0.0, None  # when something last was imported, and what was a moment ago
        while not self.done.wait(0.2):
            package = _importing()
            # What is imported stays: looking for garbage in it took a quarter of the time.
            if self.collects and bool(package) != bool(was):
                (gc.disable if package else gc.enable)()
            was = package
            stages, now = list(_stages), time.monotonic()
            imported = now if package else imported
            if now - self.last < PATIENCE or _bars():
                continue
            if package:
                self.say(f"importing {package}")
            elif stages and now - max(stages[-1][1], imported) >= PATIENCE:
                self.say(stages[-1][0])


def _bars() -> bool:
    """Whether a progress bar is shown, which says it itself."""
    tqdm = sys.modules.get("tqdm.std")
    return bool(getattr(getattr(tqdm, "tqdm", None), "_instances", ()))


def _importing() -> str | None:
    """The package of others that the main thread imports, the outermost one."""
    found = None
    frame = sys._current_frames().get(MAIN.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and "importlib" in frame.f_code.co_filename:
            package = str(frame.f_locals.get("name")).partition(".")[0]
            found = found if package == __name__.partition(".")[0] else package
        frame = frame.f_back
    return found
