"""`elit plan`: what a run will take, before its data is there."""

import argparse
from typing import Any

from elit.cli.common import Parser, format_count, format_table, print_json, whole_number
from elit.cli.config import built_in_names, load_config
from elit.cli.train import add_config_flags
from elit.cost.devices import known_accelerator

_EPILOG = """\
Nothing is made, and nothing read but the config. Data that is not there yet counts as what the
preset was made for, at --data.options.resolution. Memory is that of eager mode, without the
gigabyte or two that CUDA and its allocator need; compiled blocks keep less."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit plan`: its own, and one for each key of the config."""
    parser.usage = "elit plan [CONFIG] [--gpus N] [--gpu NAME] [--mfu M] [--key.sub VALUE ...]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help=f"YAML file, or one of the built-in {built_in_names()}",
    )
    parser.add_argument(
        "--gpus", type=whole_number(1), default=8, metavar="N", help="how many (default: 8)"
    )
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="which, such as a100 (default: h100)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.5,
        metavar="M",
        help="share of their peak that the model's operations reach (default: 0.5)",
    )
    add_config_flags(parser, dry_run=False)


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    own = ("config", "gpus", "gpu", "mfu", "json")
    overrides = {key: value for key, value in vars(args).items() if key not in own}
    known_accelerator(args.gpu)  # before the imports, as all mistakes
    config = load_config(args.config, overrides)
    from elit.training.estimate import estimate

    found = estimate(config, args.gpus, args.gpu, args.mfu)
    if args.json:
        print_json(found)
    else:
        _print(found, config.train.steps)
    return 0


def _print(found: dict[str, Any], steps: int) -> None:
    days = f" ({found['hours'] / 24:.1f} days)" if found["hours"] > 48 else ""
    print(
        f"{found['model']}: {format_count(found['parameters'])} parameters\n"
        f"training step, batch {found['batch_size']}: {found['step_tflops']:.4g} TFLOPs\n"
        f"{steps} steps: {found['total_eflops']:.4g} EFLOPs\n"
        f"{found['gpus']} x {found['gpu']}, {found['peak_tflops']:g} TFLOP/s each at MFU "
        f"{found['mfu']:g}: {found['step_seconds']:.3g} s a step, {found['hours']:.3g} hours{days}"
    )
    rows: list[tuple[str, str, str]] = []
    for what, plain, checkpointed in (
        ("weights, gradients, moments, averages", "state_gb", "state_gb"),
        ("blocks gathered by FSDP", "gathered_gb", "gathered_gb"),
        ("activations", "activations_gb", "checkpointed_gb"),
        ("in all", "memory_gb", "memory_checkpointed_gb"),
    ):
        if found[plain]:
            rows.append((what, f"{found[plain]:.1f}", f"{found[checkpointed]:.1f}"))
    header = (f"GB of {found['gpu_gb']:g}, {found['samples']} samples", "plain", "checkpointed")
    print(f"\n{format_table(header, rows)}")
