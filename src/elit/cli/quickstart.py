"""`elit quickstart`: from nothing to pictures, in one command."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from elit._files import output_folder
from elit._tables import format_table
from elit.cli.common import print_json, quiet_diffusers
from elit.cli.flags import Parser, count, flag
from elit.training.config import ModelConfig, TrainConfig
from elit.training.config_files import load_config

CONFIG = "digits"
POOR = 0.9  # accuracy at full budget below which something went wrong
_KEYS = {
    "out": "output_dir", "seed": "seed", "preset": "model.preset", "steps": "train.steps",
    "lr": "optimizer.lr",
}  # fmt: skip
EPILOG = """\
Trains the built-in config `digits` and leaves samples.png, summary.json and a pipeline
for `elit sample` in the folder. The same command again goes on if it was stopped."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit quickstart`."""
    parser.add("out", default="runs/quickstart", help="folder of the run")
    parser.add("seed", help="seed of everything random")
    parser.add("preset", **flag(
        "another tiny elastic model, such as elit-uvit-tiny/4 (default: the config's)", "NAME"
    ))  # fmt: skip
    parser.add("steps", **count(
        "training steps (default: those of the config; few make poor digits)"
    ))  # fmt: skip
    parser.add("lr", **flag("learning rate (default: that of the config)", "RATE"))
    parser.add("json")


def run(args: argparse.Namespace) -> int:
    """Train, draw, judge, print the table."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("quickstart runs in one process; under torchrun use `elit train digits`")
    with _own_flags():
        config = _config(args)
    folder = output_folder(args.out, "--out")
    from elit.training.preflight import check_config

    with _own_flags():
        data = check_config(config)
    if not config.model.preset.lower().startswith("elit-"):
        raise ValueError(
            f"--preset {args.preset} has no budgets to choose; give elit-{args.preset}"
        )
    if not config.model.overrides:
        own = load_config(CONFIG, {}).model.overrides
        left_out = ", ".join(f"{key}={value}" for key, value in own.items())
        print(f"elit: {args.preset} without the config's overrides: {left_out}", file=sys.stderr)
    from elit.training.quickstart import quickstart

    with quiet_diffusers(), _own_flags():
        summary = quickstart(config, data=data)
    if args.json:
        print_json(summary)
    elif not summary["finished"]:
        print(f"stopped and saved: {folder}\nthe same command again goes on")
    else:
        print(
            f"{_table(summary)}\n"
            f"trained in {summary['train_seconds']:.0f} s, {summary['total_seconds']:.0f} s in "
            f"all\n"
            f"picture: {folder / 'samples.png'}\n"
            f"more:    elit sample {folder} --labels 3 7 --budget 1 0.25"
        )
        if summary["rows"][0]["accuracy"] < POOR:
            print("poor digits: trained too briefly? The default number of steps is enough")
    return 0 if summary["finished"] else 130


def _config(args: argparse.Namespace) -> TrainConfig:
    given = {key: getattr(args, name) for name, key in _KEYS.items()}
    config = load_config(CONFIG, {k: str(value) for k, value in given.items() if value is not None})
    if config.model.preset.lower() == load_config(CONFIG, {}).model.preset:
        return config
    return replace(config, model=ModelConfig(args.preset))


@contextmanager
def _own_flags() -> Iterator[None]:
    """Errors name the config's keys by the flags of this command."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, key in _KEYS.items():
            if name != key:
                text = text.replace(f"--{key}", f"--{name}").replace(key, f"--{name}")
        raise ValueError(text) from error


def _table(summary: dict[str, Any]) -> str:
    """The rows, and the plain model below them."""
    from elit.interface.budget import format_budget

    header = (
        "budget", "latents per picture", "MFLOPs per forward", "of full", "ms per image",
        "held-out loss", "accuracy", "distance",
    )  # fmt: skip
    cells: list[tuple[Any, ...]] = [
        (
            format_budget(row["budget"]), row["num_latents"] * summary["num_groups"],
            f"{row['mflops']:.1f}", f"{row['share']:.0%}", f"{row['ms_per_image']:.1f}",
            f"{row['loss']:.4f}", f"{row['accuracy']:.3f}", f"{row['distance']:.2f}",
        )
        for row in summary["rows"]
    ]  # fmt: skip
    plain = summary["plain"]
    costs = f"{plain['mflops']:.1f}", f"{plain['share']:.0%}", f"{plain['ms_per_image']:.1f}"
    cells.append(("plain model, time only", "", *costs, "", "", ""))
    return format_table(header, cells)
