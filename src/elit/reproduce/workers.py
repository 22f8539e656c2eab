"""Processes that do pieces of work, and end with the one that started them."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from elit.reproduce.pieces import Piece, Pieces, StoppedError
from elit.reproduce.runs import Trainings
from elit.reproduce.scales import Scale
from elit.training.config import DataConfig
from elit.training.loop import TrainingDivergedError

_PATIENCE = 60  # seconds in which a stopped worker has saved
_UNGUARDED = 79  # exit code of a worker that would start workers
_Told = tuple[type[Exception], str, str]  # of an error: what to raise, its text, where it was


def end_if_imported() -> None:
    """End a worker that runs a script from its top which calls `reproduce` without a guard."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_UNGUARDED)


class Workers:
    """So many processes of one thread each.

    Attributes:
        busy: what they do, by their connections.
        failed: the piece that went wrong.

    Args:
        count: how many.
        scale: of the study.
        folder: of the study.
        data: name and options of the data set.
    """

    def __init__(self, count: int, scale: Scale, folder: Path, data: DataConfig):
        context = multiprocessing.get_context("spawn")
        self.busy: dict[Any, Piece] = {}
        self.failed: Piece | None = None
        self.processes: dict[Any, Any] = {}
        # Until they have handlers of their own; a signal to all is the main process's to tell.
        handler = _ignore_interrupts()
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(threads, "1"))
        try:
            for _ in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, scale, folder, data), daemon=True
                )
                process.start()
                theirs.close()
                self.processes[mine] = process
        finally:
            if handler is not None:
                signal.signal(signal.SIGINT, handler)
            for name, value in threads.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    @property
    def free(self) -> list[Any]:
        """Connections to those that wait for a piece."""
        return [connection for connection in self.processes if connection not in self.busy]

    def give(self, connection: Any, piece: Piece) -> None:
        """Hand out a piece.

        Raises:
            ChildProcessError: if the worker is gone.
        """
        try:
            connection.send(piece)
        except OSError as error:
            with contextlib.suppress(EOFError, ConnectionError):
                while connection.poll():  # it may have said why
                    self._hear(connection, *connection.recv())
            raise self._gone(connection) from error
        self.busy[connection] = piece

    def done(self, timeout: float) -> None:
        """Take what was done meanwhile off those that are busy.

        Raises:
            ChildProcessError: if a worker is gone.
            ValueError: or another error, of a worker.
        """
        ready: list[Any] = list(wait(list(self.processes), timeout))
        for connection in ready:
            try:
                self._hear(connection, *connection.recv())
            except EOFError:
                raise self._gone(connection) from None
            except ConnectionError as error:
                raise self._gone(connection) from error

    def _hear(self, connection: Any, word: str, told: _Told | None) -> None:
        """Take note of what a worker says."""
        if word == "stopped":
            return
        piece = self.busy.pop(connection, None)
        if told is not None:
            kind, text, details = told
            logging.getLogger(__name__).debug("%s", details)
            if word == "unable" or piece is None:
                raise kind(f"a worker could not start: {text}")
            self.failed = piece
            raise kind(f"{piece.key}: {text}")

    def _gone(self, connection: Any) -> Exception:
        """What to say of a worker that has ended."""
        process = self.processes[connection]
        process.join(5)
        if process.exitcode == _UNGUARDED:
            return ValueError(
                'a script has to call reproduce() under `if __name__ == "__main__":`, for its '
                "workers import the script"
            )
        return ChildProcessError(
            f"a worker has ended with exit code {process.exitcode}, perhaps for want of memory; "
            f"the same command goes on, with fewer --workers it needs less"
        )

    def end(self) -> None:
        """Have them end: there is no more to do."""
        for connection in self.processes:
            with contextlib.suppress(OSError):
                connection.send(None)
        self._join()

    def stop(self) -> None:
        """Have them save and end."""
        for process in self.processes.values():
            if process.is_alive():
                process.terminate()
        self._join()

    def _join(self) -> None:
        for process in self.processes.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _work(connection: Any, scale: Scale, folder: Path, data: DataConfig) -> None:
    """A worker: does piece after piece."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        pieces = _start(connection, scale, folder, data)
        while pieces and (piece := connection.recv()) is not None:
            connection.send(_do(pieces, piece))
    except StoppedError:
        with contextlib.suppress(OSError):
            connection.send(("stopped", None))
    except EOFError:
        pass


def _start(connection: Any, scale: Scale, folder: Path, data: DataConfig) -> Pieces | None:
    """What does the pieces; None where it cannot, and that is told."""
    try:
        import torch
        from diffusers.utils import logging as diffusers_logging

        torch.set_num_threads(1)
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        _log_to(folder / "workers.log")
        return Pieces(Trainings(scale, folder, data))
    except StoppedError:
        raise
    except Exception as error:
        connection.send(("unable", _told(error)))
        return None


def _do(pieces: Pieces, piece: Piece) -> tuple[str, _Told | None]:
    try:
        pieces.do(piece)
        return "done", None
    except StoppedError:
        raise
    except Exception as error:
        return "wrong", _told(error)


def _told(error: Exception) -> _Told:
    """An error in types that any process knows."""
    known: Sequence[type[Exception]] = (TrainingDivergedError, ValueError, OSError)
    kind = next((kind for kind in known if isinstance(error, kind)), RuntimeError)
    details = traceback.format_exc()
    return kind, str(error) if kind is not RuntimeError else details, details


def _stop(number: int, frame: FrameType | None) -> None:
    """Outside of a training, which saves by itself, there is nothing to save."""
    del number, frame
    for later in (signal.SIGINT, signal.SIGTERM):  # one is enough
        signal.signal(later, signal.SIG_IGN)
    raise StoppedError


def _ignore_interrupts() -> Any:
    """Have processes that start from now on ignore Ctrl-C; the handler that there was."""
    if threading.current_thread() is not threading.main_thread():
        return None  # only the main thread may change it
    return signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent() -> None:
    """End at once when the process that started this one is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _log_to(file: Path) -> None:
    """What the library logs, into a file: the screen has a bar."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("elit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
