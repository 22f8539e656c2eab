"""What commands share: what they print, their messages, and how flags say to draw."""

import argparse
import contextlib
import errno
import json
import logging
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elit._files import cache_advice
from elit.cli.waiting import stage
from elit.flow.words import DEFAULT_SCALE
from elit.training.config_files import config_of_run

if TYPE_CHECKING:
    from elit.flow.guidance import Guidance
    from elit.pipelines.base import ElasticPipeline

logger = logging.getLogger(__name__)


def print_report(report: Any, as_json: bool, show: Callable[[Any], None]) -> int:
    """A command's report, as JSON or by what shows it to people; the exit code 0."""
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
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


@contextlib.contextmanager
def as_flags(names: Mapping[str, str]) -> Iterator[None]:
    """Name settings in errors by the flags that they are here."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, flag in names.items():
            text = re.sub(rf"(--)?\b{re.escape(name)}\b", f"--{flag}", text)
            text = text.replace(f"--{flag}=", f"--{flag} ")
        raise ValueError(text) from error


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


# ---- how to draw ----


def check_run(name: str) -> None:
    """Raise a ValueError, before the imports, unless it is a pipeline's folder or may be a name."""
    from elit.pipelines.folder import check_pipeline_folder

    if check_pipeline_folder(name) is None:
        tell_of_hub(name)


def check_address(host: str, port: int) -> None:
    """Raise a ValueError for an address that can't be listened at."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ValueError(
                f"cannot listen at {host}, port {port}: {reason}; choose another --port"
            ) from error


def url_of(host: str, port: int) -> str:
    """Where this machine reaches what listens at an address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_guidance(args: argparse.Namespace) -> "Guidance | None":
    """Guidance of the flags; a flag without effect is an error."""
    if args.guidance == "none":
        for flag in ("scale", "guide_budget", "interval"):
            if getattr(args, flag) is not None:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} has no effect without guidance; add --guidance ccfg")
        return None
    if args.guidance == "cfg" and args.guide_budget is not None:
        raise ValueError(
            "--guide-budget has no effect with --guidance cfg, whose guide has the same budget as "
            "the sample; use --guidance ccfg"
        )
    from elit.flow.guidance import make_guidance as guidance_of

    scale = DEFAULT_SCALE if args.scale is None else args.scale
    if scale == 1:
        raise ValueError(
            f"--guidance {args.guidance} has no effect at --scale 1; choose another scale, such as "
            f"{DEFAULT_SCALE:g}, or leave --guidance out"
        )
    interval = (0.0, 1.0) if args.interval is None else tuple(args.interval)
    return guidance_of(args.guidance, scale, args.guide_budget or "lowest", interval)


def _tell_untrained_null(args: argparse.Namespace) -> None:
    """Warn of guides by the label for none, of a run that has not learned it."""
    if not hasattr(args, "scale"):  # of commands that don't guide
        return
    given = getattr(args, "guidance", None)  # where none is given: all kinds, or CFG
    kinds = {given} if isinstance(given, str) else set(given or ("cfg",))
    config = None
    if {"cfg", "ccfg"} & kinds and args.scale != 1:
        with contextlib.suppress(ValueError):  # of another program's config.yaml nothing is known
            config = config_of_run(args.run)
    if config is None or config.retrofit.base or config.few_steps.base:
        return
    if not config.objective.label_dropout:
        logger.warning(
            "%s was trained with objective.label_dropout=0: what guides by no label, cfg and ccfg, "
            "guides by chance; use ag, or no guidance", args.run,
        )  # fmt: skip


def open_pipeline(args: argparse.Namespace, local_rank: int = 0) -> "ElasticPipeline":
    """The pipeline of the flags on its device, of several processes each on its own."""
    from elit.pipelines import load

    _tell_untrained_null(args)
    with quiet_diffusers(), stage(f"loading {args.run}"):
        return load.open_pipeline(
            args.run, args.device, args.dtype, args.variant, args.sampler, local_rank,
            getattr(args, "shift", None),  # of commands that draw
        )  # fmt: skip
