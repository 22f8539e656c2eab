"""`elit quickstart`: from nothing to pictures, in one command."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from elit._files import output_folder
from elit._tables import format_table
from elit.cli.common import as_flags, print_report, quiet_diffusers
from elit.cli.flags import Parser
from elit.cli.train import drawing_flags
from elit.training.config import ModelConfig, TrainConfig
from elit.training.config_files import load_config

CONFIG = "digits"
POOR = 0.9  # accuracy at full budget below which something went wrong
_KEYS = {
    "output_dir": "out", "model.preset": "preset", "train.steps": "steps", "optimizer.lr": "lr",
}  # fmt: skip
EPILOG = """\
Trains the built-in config `digits` and leaves samples.png, summary.json and a pipeline
for `elit sample` in the folder. The same command again goes on if it was stopped."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit quickstart`."""
    preset = "another tiny elastic model, such as elit-uvit-tiny/4 (default: the config's)"
    steps = "training steps (default: those of the config; few make poor digits)"
    parser.add("out", "folder of the run", default="runs/quickstart")
    parser.add("seed", "seed of everything random")
    parser.add("preset", preset)
    parser.add("steps", steps)
    parser.add("lr", "learning rate (default: that of the config)", metavar="RATE")


@as_flags(_KEYS)
def run(args: argparse.Namespace) -> int:
    """Train, draw, judge, print the table."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("quickstart runs in one process; under torchrun use `elit train digits`")
    config = _config(args)
    output_folder(args.out, "--out")
    from elit.training.preflight import check_config

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

    with quiet_diffusers():
        summary = quickstart(config, data=data)
    print_report(summary, args.json, lambda _: _show(summary, Path(args.out)))
    return 0 if summary["finished"] else 130


def _config(args: argparse.Namespace) -> TrainConfig:
    given = {key: getattr(args, name) for key, name in {**_KEYS, "seed": "seed"}.items()}
    config = load_config(CONFIG, {k: str(value) for k, value in given.items() if value is not None})
    if config.model.preset.lower() == load_config(CONFIG, {}).model.preset:
        return config
    return replace(config, model=ModelConfig(args.preset))


def _show(summary: dict[str, Any], folder: Path) -> None:
    """The rows, and the plain model below them."""
    if not summary["finished"]:
        print(f"stopped and saved: {folder}\nthe same command again goes on")
        return
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
    drawn = drawing_flags(summary["steps"], summary["guidance_scale"], elastic=True)
    took = f"trained in {summary['train_seconds']:.0f} s, {summary['total_seconds']:.0f} s in all"
    print(
        f"{format_table(header, cells)}\n{took}\n"
        f"picture: {folder / 'samples.png'}\n"
        f"more:    elit sample {folder} --labels 3 7 --budget 1 0.25{drawn}"
    )
    if summary["rows"][0]["accuracy"] < POOR:
        print("poor digits: trained too briefly? The default number of steps is enough")
