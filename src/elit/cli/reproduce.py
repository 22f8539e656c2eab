"""`elit reproduce`: the paper's claims, trained, measured and judged by one command."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit.cli.common import (
    Parser,
    add_json_flag,
    format_table,
    one_of,
    output_folder,
    path_text,
    print_json,
    quiet_diffusers,
    whole_number,
)

if TYPE_CHECKING:
    from elit.reproduce.study import StudyResult

LETTERS = tuple("abcdefghi")
SCALES = ("tiny", "small", "base", "paper")
# What the paper's own runs are: config, and GPUs of the estimate.
PAPER_CONFIGS = tuple(
    f"imagenet-{side}/{name}"
    for side in (256, 512)
    for name in ("dit", "elit-dit", "elit-dit-mb", "uvit", "elit-uvit", "elit-uvit-mb")
)
_GPUS = 8

_EPILOG = """\
claims:
  a  ELIT against DiT at equal training FLOPs   f  a picture spread among zero tokens
  b  loss over budgets                          g  Read's attention and the loss
  c  first latents and tail dropping            h  sizes of groups
  d  guidance (draws samples)                   i  another backbone, U-ViT
  e  budget against steps (draws samples)

scales:
  tiny   15 minutes on two cores: loss alone, so not d and e; without --data on built-in digits
  small  about an hour on two cores; needs --data, a folder with Fashion-MNIST
  base   a GPU; needs --data
  paper  trains nothing: prints the commands of the paper's own runs and what they cost

The same command again goes on where it was stopped or killed. With other --claims it uses what
was done, and writes the report anew, of those claims alone, over the one that is there."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit reproduce`."""
    parser.usage = "elit reproduce --scale SCALE [--data FOLDER] [--claims a b ...] [flags]"
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--scale", type=one_of(SCALES, "scale"), required=True, metavar="SCALE",
        help="tiny, small, base or paper")  # fmt: skip
    add(
        "--data",
        type=path_text,
        metavar="FOLDER",
        help="folder with the four idx files of Fashion-MNIST",
    )
    add(
        "--out",
        type=path_text,
        metavar="DIR",
        help="folder of the results (default: runs/reproduce-SCALE)",
    )
    add("--claims", type=one_of(LETTERS, "claim"), nargs="+", metavar="LETTER",
        help="which (default: all); the report is then of these alone")  # fmt: skip
    add("--workers", type=whole_number(1), metavar="N",
        help="processes, of one thread each (default: one for each core; at base one)")  # fmt: skip
    add("--seeds", type=whole_number(1), metavar="N",
        help="trainings of each model (default: the scale's)")  # fmt: skip
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Train, measure, judge, print the table."""
    if args.scale == "paper":
        return print_paper(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce starts its own processes; run it without torchrun")
    if args.data is None and args.scale != "tiny":
        raise ValueError(
            f"--scale {args.scale} needs Fashion-MNIST, 30 MB: give --data FOLDER with its files "
            f"train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz "
            f"and t10k-labels-idx1-ubyte.gz, from github.com/zalandoresearch/fashion-mnist, "
            f"Debian's package dataset-fashion-mnist, or a mirror on the hub; --scale tiny goes "
            f"without"
        )
    if args.data is not None:
        check_data(args.data)
    out = output_folder(args.out or default_folder(args.scale), "--out")
    from elit.reproduce.scales import SCALES as TABLE
    from elit.reproduce.study import reproduce
    from elit.training.config import DataConfig

    data = DataConfig("digits")
    if args.data is not None:
        data = DataConfig("fashion-mnist", {"path": args.data})
    with quiet_diffusers():
        result = reproduce(
            TABLE[args.scale], out, data, args.claims or LETTERS, args.workers, args.seeds,
            command=typed(args),
        )  # fmt: skip
    show(result, args.json)
    return 0 if result.finished else 130


def default_folder(scale: str) -> str:
    """Where the results of a scale go."""
    return f"runs/reproduce-{scale}"


def check_data(folder: str) -> None:
    """Raise a ValueError if a folder has none of the files."""
    from elit.data.idx import FILES, is_idx_folder

    if not is_idx_folder(folder):
        raise ValueError(
            f"--data {folder} is no folder of Fashion-MNIST's files; give one with "
            f"{', '.join(FILES)} in it, plain or as .gz"
        )


def typed(args: argparse.Namespace) -> str:
    """The command line, without where its user keeps data and results."""
    words = ["elit", "reproduce", "--scale", args.scale]
    if args.data is not None:
        words += ["--data", "FOLDER"]
    if args.out is not None and Path(args.out) != Path(default_folder(args.scale)):
        words += ["--out", Path(args.out).absolute().name]
    if args.claims is not None:
        words += ["--claims", *args.claims]
    for flag in ("workers", "seeds"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    return shlex.join(words)


def show(result: "StudyResult", as_json: bool) -> None:
    """Print what came of it."""
    if result.report is None and as_json:
        print_json({"finished": False, "done": result.done, "pieces": result.pieces})
        return
    if result.report is None:
        print(
            f"stopped and saved: {result.folder}, {result.done} of {result.pieces} pieces done\n"
            f"the same command goes on"
        )
        return
    if as_json:
        print_json(result.report)
        return
    from elit.reproduce.report import PAGE, PICTURE, TABLE

    rows = [
        (f"({letter}) {row['what']}", row["here"], row["word"])
        for letter, claim in result.report["claims"].items()
        for row in claim["rows"]
    ]
    print(format_table(("claim", "here", "verdict"), rows))
    print("\n" + "\n".join(str(result.folder / name) for name in (PAGE, PICTURE, TABLE)))


def print_paper(args: argparse.Namespace) -> int:
    """The commands of the paper's own runs, and what they cost."""
    for flag in ("data", "out", "claims", "workers", "seeds"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} has no effect on --scale paper, which trains nothing")
    from elit.cli.config import load_config
    from elit.training.estimate import estimate

    runs: list[dict[str, Any]] = []
    for name in PAPER_CONFIGS:
        found = estimate(load_config(name, {}), gpus=_GPUS)
        command = f"torchrun --nproc-per-node {_GPUS} -m elit train {name}"
        runs.append({"command": command, **found})
    if args.json:
        print_json({"runs": runs})
        return 0
    rows = [
        (run["command"], f"{run['step_tflops']:.0f}", f"{run['total_eflops']:.0f}",
         f"{run['hours'] / 24:.1f}")
        for run in runs
    ]  # fmt: skip
    header = ("command", "TFLOPs a step", "EFLOPs", f"days on {_GPUS} H100 at MFU 0.5")
    print(format_table(header, rows))
    print("\nthe data first: docs/training.md; then `elit eval` and `elit sweep` on each run")
    return 0
