"""`elit train`: a config from a file and the command line, then the training loop."""

import argparse
import os
import shlex
import sys
from collections.abc import Collection
from typing import Any, get_type_hints

from elit._choices import check_choice
from elit._plain import describe_type, from_plain
from elit.cli.common import Parser, add_json_flag, output_folder, print_json
from elit.cli.config import built_in_names, config_fields, load_config
from elit.training.config import TrainConfig

_EPILOG = """\
Defaults < CONFIG < command line. Keys of data.options and model.overrides are given as
--data.options.count 500, --model.overrides.hidden_size 96; lists as --sample.budgets "[1, 0.25]".
The same command again goes on with a run that was stopped."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit train`: its own, and one for each key of the config."""
    parser.usage = "elit train [CONFIG] [--dry-run] [--json] [--key.sub VALUE ...]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help=f"YAML file, or one of the built-in {built_in_names()}",
    )
    add_config_flags(parser)


def add_config_flags(parser: Parser, without: Collection[str] = (), dry_run: bool = True) -> None:
    """`--dry-run`, `--json`, and a flag for each key of the config but some."""
    if dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="check the config, print it in full, and stop"
        )
    add_json_flag(parser)
    groups: dict[str, Any] = {"": parser.add_argument_group("the run")}
    for field in config_fields():
        if field.key in without:
            continue
        section = field.key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section}.*")
        about = f"{field.about} ({describe_type(field.hint)}; default: {field.default})"
        groups[section].add_argument(
            f"--{field.key}",
            dest=field.key,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=about.replace("%", "%%"),
        )
        if field.is_mapping:
            parser.open_flags += (f"--{field.key}.",)


def run(args: argparse.Namespace) -> int:
    """Train, or with --dry-run only check and print the config."""
    own = ("config", "dry_run", "json")
    overrides = {key: value for key, value in vars(args).items() if key not in own}
    config = load_config(args.config, overrides)
    check_config(config, thorough=args.dry_run)
    kept = config.model.overrides
    if "model.preset" in overrides and kept and not any("overrides" in key for key in overrides):
        changes = ", ".join(f"{key}={value}" for key, value in kept.items())
        print(
            f"elit: {config.model.preset} with the config's overrides: {changes}", file=sys.stderr
        )
    if args.dry_run:
        print_config(config, args.json)
        return 0
    return train_config(config, args.json)


def check_config(config: TrainConfig, thorough: bool = False) -> None:
    """Raise a ValueError for what would stop the run, before anything is made or written.

    Args:
        config: of the run.
        thorough: whether to load pretrained models too, which the run does by itself.
    """
    import torch

    from elit._devices import pick_device
    from elit.cost.flops import cost_of
    from elit.data import load_dataset
    from elit.data.order import StepBatches
    from elit.flow.objective import SigmaDensity
    from elit.models.elastic import ElasticMixin
    from elit.training.build import (
        build_model,
        check_buckets,
        check_condition,
        check_draws,
        is_foreign,
        latents_to_show,
        tail_dropping,
        text_settings,
    )
    from elit.training.distributed import shard_size

    output_folder(config.output_dir, "--output_dir")
    pick_device(config.train.device, int(os.environ.get("LOCAL_RANK", 0)))
    if config.train.tensorboard:
        from elit.training.metrics import summary_writer_class

        summary_writer_class()
    if config.train.wandb is not None:
        from elit.training.metrics import wandb_module

        wandb_module()
    objective, data = config.objective, config.data
    SigmaDensity(objective.density, objective.logit_mean, objective.logit_std)
    dataset = load_dataset(data.name, "train", **data.options)
    load_dataset(data.name, "validation", **data.options)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    chunks = processes * config.train.accumulation
    check_draws(config, chunks)
    shard_size(config.train, processes)
    StepBatches(len(dataset), data.batch_size, range(chunks), chunks, range(1), config.seed)
    if config.retrofit.base is not None:
        if not thorough:
            return
        from elit.training.finetune import build_retrofit

        model, _ = build_retrofit(config, dataset)
        check_condition(config, dataset, model)
    else:
        _check_overrides(config.model.preset, config.model.overrides)
        of_texts = text_settings(config.text, dataset)
        with torch.device("meta"):
            model = build_model(config, dataset, of_texts).requires_grad_(False)
    check_buckets(model, dataset)
    if thorough and not is_foreign(model):
        from elit.training.build import load_run_vae

        load_run_vae(config, dataset)
    if isinstance(model, ElasticMixin):
        cost_of(model)  # or an error: do the groups divide the grid?
    tail_dropping(config, model)
    latents_to_show(model, config.sample.budgets)


def _check_overrides(preset: str, overrides: dict[str, Any]) -> None:
    """Raise a ValueError for what the model doesn't take."""
    from elit.models.presets import preset_model

    hints = get_type_hints(preset_model(preset).__init__)
    names = [name for name in hints if name != "return"]
    for name, value in overrides.items():
        check_choice(name, names, "key", " of model.overrides")
        from_plain(hints[name], value, f"model.overrides.{name}")


def print_config(config: TrainConfig, as_json: bool) -> None:
    """The whole config, as YAML or JSON."""
    import yaml

    if as_json:
        print_json(config.to_dict())
    else:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")


def train_config(config: TrainConfig, as_json: bool) -> int:
    """Train, say how it ended, and give the exit code."""
    from elit.models.presets import preset_model
    from elit.training.loop import train

    result = train(config)
    is_retrofit, preset = config.retrofit.base is not None, config.model.preset
    elastic = is_retrofit or (preset.lower().startswith("elit-") and config.latents.max is None)
    budgets = " --budget 1 0.25" if elastic else ""
    takes_text = not is_retrofit and preset_model(preset).takes_text
    prompts = ' --prompts "a red disc"' if takes_text else ""
    sample = f"elit sample {shlex.quote(str(result.folder))}{prompts}{budgets}"
    if is_retrofit and not (result.folder / "model_index.json").exists():  # of diffusers
        interface = str(result.folder / "interface.safetensors")
        sample = f"elit.load_interface(pipe, {interface!r})"
        if config.retrofit.train not in ("adapters", "interface"):  # the base has changed too
            sample = f"elit.load_elastic({str(result.folder / 'transformer')!r})"
    code = 0 if result.finished else 130
    if os.environ.get("RANK", "0") != "0":  # under torchrun, the first process talks
        return code
    if as_json:
        print_json(
            {
                "output_dir": str(result.folder),
                "step": result.step,
                "finished": result.finished,
                "seconds": result.seconds,
                "sample": sample,
            }
        )
        return code
    done = f"step {result.step} of {config.train.steps}"
    if result.finished:
        print(f"trained to {done} in {result.seconds:.0f} s: {result.folder}\nsample:  {sample}")
    else:
        print(f"stopped and saved at {done}: {result.folder}\nthe same command again goes on")
    return code
