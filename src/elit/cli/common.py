"""What the commands share: flags and their values, output folders, tables, messages."""

import argparse
import contextlib
import errno
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from elit._choices import check_choice, nearest
from elit._files import cache_advice, typed_path


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, and which names the flag that was meant.

    Attributes:
        open_flags: beginnings of flags that may go on as they like, such as "--data.options.".
    """

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs, allow_abbrev=False)
        self.open_flags: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """All flags, such as "--budget"."""
        return [flag for action in self._actions for flag in action.option_strings]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        self._check_flags(args)
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed

    def _check_flags(self, args: Sequence[str]) -> None:
        """Look for unknown flags first: argparse would complain of what follows from them."""
        for word in args:
            if word == "--":  # what follows are no flags
                return
            flag = word.partition("=")[0]
            if not flag.startswith("-") or flag in self.flags or _is_number(word):
                continue
            if flag.startswith(self.open_flags) and flag not in self.open_flags:
                self.add_argument(flag, dest=flag[2:], default=argparse.SUPPRESS)
                continue
            long_flags = [known for known in self.flags if known.startswith("--")]
            near = nearest(flag, long_flags) if flag.startswith("--") else None
            raise ValueError(
                f"unknown flag {flag}: "
                + (f"did you mean {near}?" if near else f"`{self.prog} --help` lists all")
            )

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise ValueError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# ---- values of flags: each is a `type=` of argparse ----


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A whole number, at least `least` and at most `most`."""
    limits = f"at least {least}" + ("" if most == math.inf else f" and at most {most}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; give a whole number, {limits}"
            )
        return value

    return parse


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number, such as 1.5")
    return value


def budget(text: str) -> float:
    """A fraction in (0, 1], as a number or as the tables print it: 1/4."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"budget {text!r} is outside (0, 1]: it is the fraction of the latents to keep; "
            f"give a number such as 0.25 or 1/4, or 1 for all"
        )
    return value


def one_of(allowed: Sequence[str], what: str) -> Callable[[str], str]:
    """One of a few words."""

    def parse(text: str) -> str:
        try:
            check_choice(text, allowed, what)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def path_text(text: str) -> str:
    """A path, with `~` and `$VARIABLES` replaced; names of the hub and of data sets stay."""
    try:
        return typed_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """`--json`, alike in all commands."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


# ---- output ----


def output_folder(path: str | Path, flag: str) -> Path:
    """A folder to write into; an error now, not after the work, if that cannot be.

    Args:
        path: the folder, which need not exist yet, and is not made here.
        flag: the flag that chooses it, for the message.
    """
    folder = Path(path)
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        reason = f"{existing} is not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"{existing} is read-only for you"
    else:
        return folder
    raise ValueError(f"cannot write into {folder}: {reason}; choose another folder with {flag}")


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2))


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under their names, the first to the left, the others to the right."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def flops_column(gflops: Sequence[float]) -> tuple[str, list[str]]:
    """Name and cells of a column of FLOPs: in MFLOPs where the largest is below 1 GFLOP."""
    unit, factor = ("MFLOPs", 1000) if max(gflops) < 1 else ("GFLOPs", 1)
    digits = 1 if max(gflops) * factor >= 10 else 3
    return unit, [f"{value * factor:.{digits}f}" for value in gflops]


def with_error(value: float, error: float | None) -> tuple[str, str]:
    """A signed value and its standard error, both to the error's second significant digit.

    Without an error, or with none above 0, the value has three digits: 0.00002, 0.000012 ->
    ('+0.000020', '0.000012').
    """
    if not error or not math.isfinite(error):
        return f"{value:+.3g}", "-" if error is None else f"{error:.3g}"
    error_text = f"{error:.1e}"  # rounded first: 0.0996 has its second digit where 0.10 has
    digits = 1 - int(error_text.partition("e")[2])
    if digits > 8:
        return f"{value:+.1e}", error_text
    digits = max(digits, 0)
    return f"{value:+.{digits}f}", f"{error:.{digits}f}"


def format_count(number: int) -> str:
    """698300000 -> '698.3 M'."""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def format_input(resolution: int | list[int], frames: int | None, config: Mapping[str, Any]) -> str:
    """256, None -> '256 px'; [256, 512], 29 -> '29 frames of 256x512 px'.

    Without an autoencoder the size is that of the model's input, by its config: of more channels
    than an image has these are VAE latents.
    """
    from elit.pipelines.folder import draws_images

    sides = [resolution] * 2 if isinstance(resolution, int) else list(resolution)
    own = config["sample_size"]
    own = [own] * 2 if isinstance(own, int) else list(own)
    if not draws_images(config["in_channels"]) and own[-2:] == sides:
        length = [] if frames is None else [frames]
        return f"{'x'.join(map(str, [*length, *sides]))} VAE latents"
    size = resolution if isinstance(resolution, int) else "x".join(map(str, sides))
    return f"{size} px" if frames is None else f"{frames} frames of {size} px"


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
