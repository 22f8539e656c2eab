"""`elit inspect`: where Read looks, where the loss is, and what each latent contributes."""

import argparse
from pathlib import Path
from typing import Any

from elit._files import output_folder, typed_path
from elit._numbers import as_number
from elit.choosing.sweep_file import default_home
from elit.cli.common import check_run, open_pipeline, print_report
from elit.cli.flags import OWN_STEPS, OneOf, Parser, WholeNumber
from elit.data import SPLITS
from elit.training.config_files import config_of_run, read_flag

USAGE = "elit inspect RUN [--sigma S ...] [--budget B ...] [flags]"
EPILOG = """\
Writes inspect.json (all numbers), maps.safetensors (all maps) and the pictures inspect.png,
latents.png, budgets.png and worth.png. Options of --data are given as --data.options.count 500.

A correlation says little without its control: "shuffled" is that of the attention on one image
with the loss on another. Where both are alike, the attention is a pattern of position; "other
noise" is what is left where the two maps have not seen the same noise."""
_OPTION = "data.options."
STEPS = 20


def add_arguments(parser: Parser) -> None:
    """Flags of `elit inspect`."""
    add = parser.add
    add("RUN variant")
    add("images", "images to look at, spread over the data", WholeNumber(2), default=32)
    add("draws", "draws of noise for each image, an even number", WholeNumber(2), default=4)
    add("sigma", "noise levels, 1 is noise alone", _noise_level, "S", nargs="+",
        default=[0.25, 0.5, 0.75])  # fmt: skip
    add("budget", "fractions of the latents to look at", nargs="+", default=[1.0, 0.25])
    add("steps", f"steps of the samples that are compared {OWN_STEPS.format(STEPS)}")
    add_data_flags(parser)
    add("batch-size", "samples of a forward")
    add("seed", "seed of the noise and the shuffles")
    add("device")
    add("out", "folder to write into (default: RUN/inspected)")
    parser.set_defaults(sampler=None, dtype="fp32")


def add_data_flags(parser: Parser) -> None:
    """Flags that `data_of` reads."""
    parser.open_flags = (f"--{_OPTION}",)
    parser.add("data", "data set (default: the one that RUN was trained on)", typed_path)
    parser.add("split", "split of the data set: {}", OneOf(SPLITS, "split"), default="validation")


def _noise_level(text: str) -> float:
    if not 0 <= (value := as_number(text)) <= 1:
        raise ValueError(
            f"noise level {text!r} is outside [0, 1]: 0 is data, 1 is noise; give one such as 0.5"
        )
    return value


def run(args: argparse.Namespace) -> int:
    """Look, write and tell."""
    check_run(args.run)
    from elit.data import load_dataset
    from elit.inspection.inspector import check_elastic
    from elit.inspection.report import inspect_pipeline, report_text
    from elit.inspection.subject import choose_subject
    from elit.pipelines.folder import weights_digest

    pipeline = open_pipeline(args)
    pipeline.set_progress_bar_config(disable=True)
    check_elastic(pipeline.transformer, args.run)
    folder = output_folder(args.out or default_home(args.run) / "inspected", "--out")
    name, options = data_of(args)
    dataset = load_dataset(name, args.split, **options)
    subject, indices, names = choose_subject(
        pipeline, dataset, name, args.images, args.draws, args.seed, args.batch_size
    )
    about = {"run": args.run, "weights": weights_digest(Path(args.run)), "data": name}
    about |= {"options": options, "split": args.split, "indices": indices}
    steps = args.steps or pipeline.few_steps or STEPS
    report = inspect_pipeline(
        pipeline, subject, names, folder, args.sigma, args.budget, steps, about
    )
    return print_report(report, args.json, lambda report: print(report_text(report)))


def data_of(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name and options of the data set of the flags, or of what a run was trained on."""
    given = {
        key.removeprefix(_OPTION): read_flag(key, text)
        for key, text in vars(args).items()
        if key.startswith(_OPTION)
    }
    if args.data is not None:
        return args.data, given
    config = config_of_run(args.run)
    if config is None:
        raise ValueError(
            f"{args.run} has no config.yaml, which would say what it was trained on; choose a data "
            f"set with --data, such as --data digits"
        )
    return config.data.name, {**config.data.options, **given}
