"""`elit finetune`: a pretrained pipeline made elastic, then the training loop."""

import argparse
from pathlib import Path
from typing import Any

from elit.cli.common import Parser, path_text, quiet_diffusers
from elit.cli.config import built_in_names, load_config, read_yaml
from elit.cli.train import add_config_flags, check_config, print_config, train_config

DEFAULTS = "finetune"  # the built-in config
_FROM_BASE = ("data", "text", "objective")  # sections that a fine-tuning takes from its base
_EPILOG = """\
Without a CONFIG it is the built-in `finetune`, with the data that BASE was trained on, if BASE is
the output_dir of `elit train`. Defaults < BASE < CONFIG < command line.
The same command again goes on with a run that was stopped."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit finetune`: those of `elit train`, and the base."""
    parser.usage = "elit finetune BASE [CONFIG] [--dry-run] [--json] [--key.sub VALUE ...]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "base", type=path_text, metavar="BASE", help="pretrained pipeline: folder or hub name"
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default=DEFAULTS,
        help=f"YAML file, or one of the built-in {built_in_names()}",
    )
    add_config_flags(parser, without=("retrofit.base", "model.preset", "model.overrides"))


def run(args: argparse.Namespace) -> int:
    """Fine-tune, or with --dry-run only check and print the config."""
    from elit.pipelines.folder import may_be_on_hub

    own = ("base", "config", "dry_run", "json")
    overrides = {key: value for key, value in vars(args).items() if key not in own}
    if not (Path(args.base).is_dir() or may_be_on_hub(args.base)):
        raise ValueError(
            f"there is no folder {args.base}; give the output_dir of `elit train`, or a folder "
            f"that save_pretrained wrote; `hf download NAME --local-dir FOLDER` fetches one"
        )
    config = load_config(args.config, overrides, _settings_of(Path(args.base)))
    with quiet_diffusers():
        check_config(config, thorough=args.dry_run)
    if args.dry_run:
        print_config(config, args.json)
        return 0
    with quiet_diffusers():
        return train_config(config, args.json)


def _settings_of(base: Path) -> dict[str, Any]:
    """What a fine-tuning takes over from the run that trained its base."""
    settings: dict[str, Any] = {}
    if (base / "config.yaml").exists():
        trained = read_yaml(base / "config.yaml")
        settings = {key: trained[key] for key in _FROM_BASE if key in trained}
        settings["seed"] = trained.get("seed", 0)
    return settings | {"retrofit": {"base": str(base)}}
