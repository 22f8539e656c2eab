"""`elit reproduce`: the paper's claims, trained, measured and judged by one command."""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from elit._files import output_folder, typed_path
from elit._tables import format_table
from elit.cli.common import print_report, quiet_diffusers
from elit.cli.flags import OneOf, Parser, WholeNumber
from elit.reproduce.scales import PAPER, SCALES, paper_runs

LETTERS = tuple("abcdefghi")
USAGE = "elit reproduce --scale SCALE [--data FOLDER] [--claims a b ...] [flags]"
EPILOG = """\
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
    add = parser.add
    add("scale", "size of the study: {}", OneOf((*SCALES, PAPER), "scale"), "SCALE", required=True)
    add("data", "folder with the four idx files of Fashion-MNIST", typed_path, "FOLDER")
    add("out", "folder of the results (default: runs/reproduce-SCALE)")
    add("claims", "claims of the report (default: all)", OneOf(LETTERS, "claim"), "LETTER",
        nargs="+")  # fmt: skip
    add("workers", "processes, of one thread each (default: one a core; at base one)",
        WholeNumber())  # fmt: skip
    add("seeds", "trainings of each model (default: the scale's)", WholeNumber())


def run(args: argparse.Namespace) -> int:
    """Train, measure, judge, print the table."""
    if args.scale == PAPER:
        return show_paper(args)
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
    from elit.data.idx import FILES, is_idx_folder

    if args.data is not None and not is_idx_folder(args.data):
        raise ValueError(
            f"--data {args.data} is no folder of Fashion-MNIST's files; give one with "
            f"{', '.join(FILES)} in it, plain or as .gz"
        )
    out = output_folder(args.out or default_folder(args.scale), "--out")
    from elit.reproduce.study import reproduce
    from elit.training.config import DataConfig

    data = DataConfig("digits")
    if args.data is not None:
        data = DataConfig("fashion-mnist", {"path": args.data})
    with quiet_diffusers():
        result = reproduce(
            SCALES[args.scale], out, data, args.claims or LETTERS, args.workers, args.seeds,
            command=typed(args),
        )  # fmt: skip
    if result.report is None:
        stopped = {"finished": False, "done": result.done, "pieces": result.pieces}
        print_report(stopped, args.json, lambda _: print(
            f"stopped and saved: {result.folder}, {result.done} of {result.pieces} pieces done\n"
            f"the same command goes on"))  # fmt: skip
    else:
        print_report(result.report, args.json, lambda report: _show(report, result.folder))
    return 0 if result.finished else 130


def default_folder(scale: str) -> str:
    """Where the results of a scale go."""
    return f"runs/reproduce-{scale}"


def typed(args: argparse.Namespace) -> str:
    """The command line, without where its user keeps data and results."""
    shown = {name: getattr(args, name) for name in ("scale", "data", "out", "claims", "workers",
             "seeds")}  # fmt: skip
    shown["data"] = args.data and "FOLDER"
    if args.out is not None:
        is_default = Path(args.out) == Path(default_folder(args.scale))
        shown["out"] = None if is_default else Path(args.out).absolute().name
    words = ["elit", "reproduce"]
    for name, value in shown.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def _show(report: dict[str, Any], folder: Path) -> None:
    from elit.reproduce.report import PAGE, PICTURE, TABLE

    rows = [
        (f"({letter}) {row['what']}", row["here"], row["word"])
        for letter, claim in report["claims"].items()
        for row in claim["rows"]
    ]
    print(format_table(("claim", "here", "verdict"), rows))
    print("\n" + "\n".join(str(folder / name) for name in (PAGE, PICTURE, TABLE)))


def show_paper(args: argparse.Namespace) -> int:
    """The commands of the paper's own runs, and what they cost."""
    for name in ("data", "out", "claims", "workers", "seeds"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} has no effect on --scale paper, which trains nothing")
    return print_report({"runs": paper_runs()}, args.json, _show_paper)


def _show_paper(report: dict[str, Any]) -> None:
    rows = [
        (run["command"], f"{run['step_tflops']:.0f}", f"{run['total_eflops']:.0f}",
         f"{run['hours'] / 24:.1f}")
        for run in report["runs"]
    ]  # fmt: skip
    gpus = report["runs"][0]["gpus"]
    header = ("command", "TFLOPs a step", "EFLOPs", f"days on {gpus} H100 at MFU 0.5")
    print(format_table(header, rows))
    print("\nthe data first: docs/training.md; then `elit eval` and `elit sweep` on each run")
