"""What the commands print: reports, tables, numbers, messages."""

import contextlib
import errno
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elit._files import cache_advice


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2))


def print_report(report: Any, as_json: bool, show: Callable[[Any], None]) -> int:
    """A command's report, as JSON or by what shows it to people; the exit code 0."""
    (print_json if as_json else show)(report)
    return 0


def flops_column(gflops: Sequence[float]) -> tuple[str, list[str]]:
    """Name and cells of a column of FLOPs: in MFLOPs where the largest is below 1 GFLOP."""
    unit, factor = ("MFLOPs", 1000) if max(gflops) < 1 else ("GFLOPs", 1)
    digits = 1 if max(gflops) * factor >= 10 else 3
    return unit, [f"{value * factor:.{digits}f}" for value in gflops]


def format_count(number: int) -> str:
    """698300000 -> '698.3 M'."""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        reason = error.strerror[0].lower() + error.strerror[1:]
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{place}{reason}; make room, then run the same command again"
        advice = cache_advice(error.filename) if isinstance(error.filename, str) else None
        advice = advice or "check that it exists and that you may read and write there"
        return f"{place}{reason}; {advice}"
    return " ".join(str(error).split()) or type(error).__name__


class _StderrHandler(logging.Handler):
    """Writes log records to stderr, above a progress bar if there is one, each message once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if record.getMessage() in self.seen:
            return
        self.seen.add(record.getMessage())
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(f"elit: {level}{record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Show what the library logs."""
    logger, handler = logging.getLogger("elit"), _StderrHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def tell_of_hub(name: str) -> None:
    """On a screen, say what is waited for: out of reach the hub is tried for half a minute."""
    if sys.stderr.isatty():
        print(f"elit: asking the Hugging Face hub for {name}", file=sys.stderr)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' loading bar, its hints for its own users, and warnings that it causes."""
    from diffusers.utils import logging as diffusers_logging

    verbosity, bar = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if bar:
            diffusers_logging.enable_progress_bar()
