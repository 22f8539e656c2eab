"""`elit train`: a config from a file and the command line, then the training loop."""

import argparse
import os
import shlex
import sys
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from elit._files import typed_path
from elit._plain import describe_type
from elit.cli.common import print_report
from elit.cli.flags import Parser
from elit.training.config import TrainConfig
from elit.training.config_files import built_in_names, config_fields, load_config

USAGE = "elit train [CONFIG] [--match-flops RUN] [--dry-run] [--json] [--key.sub VALUE ...]"
EPILOG = """\
Defaults < CONFIG < command line. Keys of data.options and model.overrides are given as
--data.options.count 500, --model.overrides.hidden_size 96; lists as --sample.budgets "[1, 0.25]".
The same command again goes on with a run that was stopped."""


def add_arguments(
    parser: Parser, default: str | None = None, without: Collection[str] = (), trains: bool = True
) -> None:
    """Flags of `elit train`: its own, and one for each key of the config but some."""
    about = f"YAML file, or one of the built-in {built_in_names()}"
    parser.add("CONFIG", about, nargs="?", default=default)
    parser.add("match-flops", "run or config, whose training FLOPs set --train.steps", typed_path,
               "RUN")  # fmt: skip
    if trains:
        parser.switch("dry-run", "check the config, print it in full, and stop")
    groups = {"": parser.add_argument_group("the run")}
    for field in config_fields():
        if field.key in without:
            continue
        section = field.key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section}.*")
        about = f"{field.about} ({describe_type(field.hint)}; default: {field.default})"
        groups[section].add_argument(
            f"--{field.key}", dest=field.key, metavar="VALUE", default=argparse.SUPPRESS,
            help=about.replace("%", "%%"),
        )  # fmt: skip
        if field.is_mapping:
            parser.open_flags += (f"--{field.key}.",)


def overrides_of(args: argparse.Namespace) -> dict[str, str]:
    """What was typed for keys of the config."""
    sections = {field.name for field in fields(TrainConfig)}
    return {key: text for key, text in vars(args).items() if key.partition(".")[0] in sections}


def run(args: argparse.Namespace) -> int:
    """Train, or with --dry-run only check and print the config."""
    overrides = overrides_of(args)
    asked = args.dry_run or args.match_flops or "train.steps" in overrides
    if args.config is None and not asked:  # nobody means the default's half a million steps
        raise ValueError(
            f"no CONFIG is given; name a YAML file or one of the built-in {built_in_names()}; or "
            f"give --train.steps"
        )
    config = matched(load_config(args.config, overrides), args, overrides)
    return check_and_train(config, args, overrides)


def matched(
    config: TrainConfig, args: argparse.Namespace, overrides: dict[str, str]
) -> TrainConfig:
    """The config with the steps that --match-flops asks for."""
    if args.match_flops is None:
        return config
    if "train.steps" in overrides:
        raise ValueError("--match-flops sets --train.steps; give one of them")
    from elit.training.estimate import match_flops

    return match_flops(config, args.match_flops)


def check_and_train(
    config: TrainConfig, args: argparse.Namespace, overrides: dict[str, str]
) -> int:
    """Check a config, then print it, with --dry-run, or train and say how it ended."""
    from elit.training.preflight import check_config

    data = check_config(config, thorough=args.dry_run)
    kept = config.model.overrides
    if "model.preset" in overrides and kept and not any("overrides" in key for key in overrides):
        changes = ", ".join(f"{key}={value}" for key, value in kept.items())
        print(
            f"elit: {config.model.preset} with the config's overrides: {changes}", file=sys.stderr
        )
    if args.dry_run:
        import yaml

        def show(values: dict[str, Any]) -> None:
            print(yaml.safe_dump(values, sort_keys=False), end="")

        return print_report(config.to_dict(), args.json, show)
    from elit.training.loop import train

    result = train(config, data=data)
    code = 0 if result.finished else 130
    if os.environ.get("RANK", "0") != "0":  # under torchrun, the first process talks
        return code
    folder, sample = result.folder, sample_command(config)
    done = f"step {result.step} of {config.train.steps}"
    report = {"output_dir": str(folder), "step": result.step, "finished": result.finished}
    report |= {"seconds": result.seconds, "sample": sample}
    text = f"stopped and saved at {done}: {folder}\nthe same command again goes on"
    if result.finished:
        text = f"trained to {done} in {result.seconds:.0f} s: {folder}\nsample:  {sample}"
    print_report(report, args.json, lambda _: print(text))
    return code


def sample_command(config: TrainConfig) -> str:
    """How a trained model is drawn with, or loaded where diffusers draws."""
    from elit.models.presets import preset_model

    folder, preset = Path(config.output_dir), config.model.preset
    is_retrofit = config.retrofit.base is not None
    if is_retrofit and not (folder / "model_index.json").exists():  # of diffusers
        if config.retrofit.train in ("adapters", "interface"):
            return f"elit.load_interface(pipe, {str(folder / 'interface.safetensors')!r})"
        return f"elit.load_elastic({str(folder / 'transformer')!r})"  # the base has changed too
    elastic = is_retrofit or (preset.lower().startswith("elit-") and config.latents.max is None)
    takes_text = not is_retrofit and preset_model(preset).takes_text
    prompts = ' --prompts "a red disc"' if takes_text else ""
    budgets = " --budget 1 0.25" if elastic else ""
    drawn = drawing_flags(config.pictures.steps, config.pictures.guidance_scale, elastic)
    return f"elit sample {shlex.quote(str(folder))}{prompts}{budgets}{drawn}"


def drawing_flags(steps: int, scale: float, elastic: bool) -> str:
    """Flags of `elit sample` that draw as a run's own pictures are drawn."""
    guidance = f" --guidance {'ccfg' if elastic else 'cfg'} --scale {scale:g}"
    return f" --steps {steps}{guidance if scale != 1 else ''}"
