"""Processes that do pieces of work, and end with the one that started them.

By hand, for a pool of `concurrent.futures` doesn't say how a worker has ended.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elit._signals import stop_on_signals
from elit.reproduce.measure import Bench
from elit.reproduce.runs import Piece, Trainings
from elit.reproduce.scales import Scale
from elit.training.config import DataConfig
from elit.training.loop import TrainingDivergedError
from elit.training.metrics import FILE as METRICS
from elit.training.metrics import read_metrics

_POLL = 1.0  # seconds
_PATIENCE = 60  # seconds in which a stopped worker has saved
_UNGUARDED = 79  # exit code of a worker that would start workers


def do_all(
    needs: Mapping[str, Mapping[str, Piece]],
    todo: dict[str, Piece],
    count: int,
    trainings: Trainings,
    progress: bool,
) -> None:
    """Do what of the claims' needs is to be done, the longest first, or till a signal comes."""
    pieces = {key: piece for needed in needs.values() for key, piece in needed.items()}
    folder = trainings.folder
    total = sum(piece.cost for piece in pieces.values()) / 1e12

    def done(*left: Piece) -> float:
        return total - sum(p.cost * (1 - _share(p, trainings)) for p in left) / 1e12

    bar = tqdm(
        total=total, desc="reproducing", disable=not progress, dynamic_ncols=True,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} TFLOPs "
        "[{elapsed}<{remaining}{postfix}]", initial=done(*todo.values()),
    )  # fmt: skip
    with bar, stop_on_signals() as stop_requested, Workers(count, trainings) as crew:
        try:
            while (todo or crew.busy) and not stop_requested():
                crew.listen(_POLL)
                while crew.idle and (ready := [p for p in todo.values() if p.is_ready(folder)]):
                    longest = max(ready, key=lambda piece: piece.cost)
                    crew.give(todo.pop(longest.key))
                left = [*todo.values(), *crew.busy.values()]
                bar.n = max(bar.n, done(*left))
                bar.set_postfix_str(f"{len(left)} pieces left", refresh=False)
                bar.refresh() if not bar.disable and os.isatty(2) else bar.update(0)
        except ChildProcessError:
            if not stop_requested():  # the signal may have come to all at once
                raise
        except TrainingDivergedError as error:
            assert crew.failed is not None
            raise TrainingDivergedError(f"{error}; {way_out(needs, crew.failed)}") from error
        if stop_requested():
            bar.set_postfix_str("stopping")


def way_out(needs: Mapping[str, Mapping[str, Piece]], piece: Piece) -> str:
    """What can be judged though a piece cannot be done."""
    others = [letter for letter, needed in needs.items() if piece.key not in needed]
    ways = [f"--claims {' '.join(others)}"] if others else []
    if piece.training.seed > 1:
        ways.append(f"--seeds {piece.training.seed}")
    stuck = " ".join(letter for letter in needs if letter not in others)
    known = f"; without it there is {' or '.join(ways)}" if ways else ""
    return f"the same happens each time, and claims {stuck} need this piece{known}"


def _share(piece: Piece, trainings: Trainings) -> float:
    """How much of a piece is done, by the last line that its training has logged."""
    if piece.kind != "train":
        return 0.0
    try:
        run = read_metrics(trainings.folder / "runs" / piece.training.name / METRICS)
    except OSError:
        return 0.0
    return max((line[-1][0] for line in run.values()), default=0) / piece.training.steps


def end_if_imported() -> None:
    """End a worker that runs a script from its top which calls `reproduce` without a guard."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_UNGUARDED)


class Workers:
    """So many processes of one thread each, ended with its context: by a signal if they work."""

    def __init__(self, count: int, trainings: Trainings):
        self.idle: list[Any] = []  # connections to those that wait for a piece
        self.busy: dict[Any, Piece] = {}  # what the others do, by their connections
        self.failed: Piece | None = None  # what went wrong
        self.processes: dict[Any, Any] = {}
        context = multiprocessing.get_context("spawn")
        in_main = threading.current_thread() is threading.main_thread()  # it alone has handlers
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
        try:  # Ctrl-C, which goes to all, is the main process's to tell
            for _ in range(count):
                mine, theirs = context.Pipe()
                work = theirs, trainings.scale, trainings.folder, trainings.data
                process = context.Process(target=_work, args=work, daemon=True)
                process.start()
                theirs.close()
                self.processes[mine] = process
        finally:
            if in_main:
                signal.signal(signal.SIGINT, handler)

    def give(self, piece: Piece) -> None:
        """Hand out a piece to one that waits; a ChildProcessError if it is gone."""
        connection = self.idle.pop()
        try:
            connection.send(piece)
        except OSError as error:
            raise self._gone(connection) from error
        self.busy[connection] = piece

    def listen(self, timeout: float) -> None:
        """Hear which are ready for a piece; an error of theirs, or a ChildProcessError, if not."""
        ready: list[Any] = list(wait(list(self.processes), timeout))
        for connection in ready:
            try:
                error = connection.recv()
            except (EOFError, ConnectionError) as end:
                raise self._gone(connection) from end
            piece = self.busy.pop(connection, None)
            if error is not None:
                self.failed, (kind, text, details) = piece, error
                logging.getLogger(__name__).debug("%s", details)
                start = "a worker could not start" if piece is None else piece.key
                raise kind(f"{start}: {text}")
            self.idle.append(connection)

    def _gone(self, connection: Any) -> Exception:
        process = self.processes[connection]
        process.join(5)
        if process.exitcode == _UNGUARDED:
            guard = 'under `if __name__ == "__main__":`, for its workers import the script'
            return ValueError(f"a script has to call reproduce() {guard}")
        return ChildProcessError(
            f"a worker has ended with exit code {process.exitcode}, perhaps for want of memory; "
            f"the same command goes on, with fewer --workers it needs less"
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for connection, process in self.processes.items():
            if error is not None or self.busy:
                process.terminate()
            else:
                with contextlib.suppress(OSError):
                    connection.send(None)
        for process in self.processes.values():
            process.join(_PATIENCE)
            process.kill()
            process.join()


def _work(connection: Any, scale: Scale, folder: Path, data: DataConfig) -> None:
    """Do piece after piece; each time, and first of all, tell what went wrong, or None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    bench, piece = None, None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            try:
                bench = bench or _prepare(scale, folder, data)
                if piece is not None and not bench.do(piece):
                    return  # stopped, and saved
                error = None
            except Exception as wrong:
                error = _told(wrong)
            connection.send(error)
            piece = connection.recv()
            if piece is None:
                return


def _prepare(scale: Scale, folder: Path, data: DataConfig) -> Bench:
    """Set up one thread, and what is logged into a file, for the screen has a bar."""
    import torch
    from diffusers.utils import logging as diffusers_logging

    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    handler = logging.FileHandler(folder / "workers.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("elit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return Bench(Trainings(scale, folder, data))


def _told(error: Exception) -> tuple[type[Exception], str, str]:
    """What to raise of an error in types that any process knows, its text, and where it was."""
    known: tuple[type[Exception], ...] = (TrainingDivergedError, ValueError, OSError)
    kind = next((kind for kind in known if isinstance(error, kind)), RuntimeError)
    details = traceback.format_exc()
    return kind, str(error) if kind is not RuntimeError else details, details


def _end_with_parent() -> None:
    """End at once when the process that started this one is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
