"""`elit quickstart`: from nothing to pictures, in one command."""

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from elit.cli.common import (
    Parser,
    add_json_flag,
    format_table,
    output_folder,
    path_text,
    print_json,
    quiet_diffusers,
    whole_number,
)
from elit.cli.config import load_config
from elit.cli.train import check_config
from elit.training.config import ModelConfig

if TYPE_CHECKING:
    from elit.training.quickstart import QuickstartSummary

POOR = 0.9  # accuracy at full budget below which something went wrong


def add_arguments(parser: Parser) -> None:
    """Flags of `elit quickstart`."""
    parser.epilog = (
        "Trains the built-in config `digits` and leaves samples.png, summary.json and a pipeline\n"
        "for `elit sample` in the folder. The same command again goes on if it was stopped."
    )
    parser.add_argument(
        "--out",
        type=path_text,
        metavar="DIR",
        default="runs/quickstart",
        help="folder of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of everything random (default: 0)"
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="another tiny elastic model, such as elit-uvit-tiny/4 (default: the config's)",
    )
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        help="training steps (default: those of the config; few make poor digits)",
    )
    parser.add_argument(
        "--lr",
        metavar="RATE",
        help="learning rate (default: that of the config)",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Train, draw, judge, print the table."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("quickstart runs in one process; under torchrun use `elit train digits`")
    overrides = {"output_dir": args.out, "seed": str(args.seed)}
    if args.steps is not None:
        overrides["train.steps"] = str(args.steps)
    if args.preset is not None:
        overrides["model.preset"] = args.preset
    if args.lr is not None:
        overrides["optimizer.lr"] = args.lr
    try:
        config = load_config("digits", overrides)
    except ValueError as error:
        raise _with_own_flags(error) from error
    given, own = args.preset, load_config("digits", {}).model
    other_model = given is not None and given.lower() != own.preset
    if other_model:
        config = replace(config, model=ModelConfig(given))
    folder = output_folder(args.out, "--out")
    try:
        check_config(config)
    except ValueError as error:
        raise _with_own_flags(error) from error
    if not config.model.preset.lower().startswith("elit-"):
        raise ValueError(
            f"--preset {args.preset} has no budgets to choose; give elit-{args.preset}"
        )

    if other_model:
        left_out = ", ".join(f"{key}={value}" for key, value in own.overrides.items())
        print(f"elit: {given} without the config's overrides: {left_out}", file=sys.stderr)

    from elit.training.quickstart import quickstart

    with quiet_diffusers():
        try:
            summary = quickstart(config)
        except ValueError as error:
            raise _with_own_flags(error) from error
    if args.json:
        print_json(summary.to_dict())
    elif not summary.finished:
        print(f"stopped and saved: {folder}\nthe same command again goes on")
    else:
        print(_table(summary))
        print(
            f"trained in {summary.train_seconds:.0f} s, {summary.total_seconds:.0f} s in all\n"
            f"picture: {folder / 'samples.png'}\n"
            f"more:    elit sample {folder} --labels 3 7 --budget 1 0.25"
        )
        if summary.rows[0].accuracy < POOR:
            print("poor digits: trained too briefly? The default number of steps is enough")
    return 0 if summary.finished else 130


def _table(summary: "QuickstartSummary") -> str:
    """The rows, and the plain model below them."""
    from elit.interface.budget import format_budget

    header = [
        "budget",
        "latents per picture",
        "MFLOPs per forward",
        "of full",
        "ms per image",
        "held-out loss",
        "accuracy",
        "distance",
    ]
    cells = [
        [
            format_budget(row.budget),
            str(row.num_latents * summary.num_groups),
            f"{row.mflops:.1f}",
            f"{row.share:.0%}",
            f"{row.ms_per_image:.1f}",
            f"{row.loss:.4f}",
            f"{row.accuracy:.3f}",
            f"{row.distance:.2f}",
        ]
        for row in summary.rows
    ]
    if summary.plain is not None:
        plain = summary.plain
        costs = [f"{plain.mflops:.1f}", f"{plain.share:.0%}", f"{plain.ms_per_image:.1f}"]
        cells.append(["plain model, time only", "", *costs, "", "", ""])
    return format_table(header, cells)


def _with_own_flags(error: ValueError) -> ValueError:
    """The same error; the config's keys have other names here."""
    text = str(error)
    for key, flag in (
        ("train.steps", "--steps"),
        ("output_dir", "--out"),
        ("model.preset", "--preset"),
        ("optimizer.lr", "--lr"),
    ):
        text = text.replace(f"--{key}", flag).replace(key, flag)
    return ValueError(text)
