"""`elit finetune`: a pretrained pipeline made elastic, then the training loop."""

import argparse

from elit._files import typed_path
from elit.cli import train
from elit.cli.common import quiet_diffusers
from elit.cli.flags import Parser
from elit.training.config_files import load_config, settings_of_base

USAGE = "elit finetune BASE [CONFIG] [--dry-run] [--json] [--key.sub VALUE ...]"
EPILOG = """\
Without a CONFIG it is the built-in `finetune`, with the data that BASE was trained on, if BASE is
the output_dir of `elit train`. Defaults < BASE < CONFIG < command line.
The same command again goes on with a run that was stopped."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit finetune`: those of `elit train`, and the base."""
    parser.add("BASE", "pretrained pipeline: folder or hub name", typed_path)
    set_here = "retrofit.base", "model.preset", "model.overrides"
    train.add_arguments(parser, default="finetune", without=set_here)


def run(args: argparse.Namespace) -> int:
    """Fine-tune, or with --dry-run only check and print the config."""
    overrides = train.overrides_of(args)
    config = load_config(args.config, overrides, settings_of_base(args.base))
    config = train.matched(config, args, overrides)
    with quiet_diffusers():
        return train.check_and_train(config, args, overrides)
