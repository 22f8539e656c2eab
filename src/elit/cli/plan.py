"""`elit plan`: what a run will take, before its data is there."""

import argparse
from typing import Any

from elit._tables import counted, duration, format_table, in_units
from elit.cli import train
from elit.cli.common import format_count, print_report
from elit.cli.flags import Parser, WholeNumber, number
from elit.cost.devices import known_accelerator
from elit.training.config_files import load_config

USAGE = (
    "elit plan [CONFIG] [--match-flops RUN] [--gpus N] [--gpu NAME] [--mfu M] [--key.sub VALUE ...]"
)
EPILOG = """\
Nothing is made, and nothing read but the config. Data that is not there yet counts as what the
preset was made for, at --data.options.resolution. Memory is that of eager mode, without the
gigabyte or two that CUDA and its allocator need; compiled blocks keep less."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit plan`: its own, and one for each key of the config."""
    parser.add("gpus", "number of GPUs", WholeNumber(), default=8)
    parser.add("gpu", "kind of GPU, such as a100", default="h100")
    parser.add("mfu", "share of their peak that is reached", number, "M", default=0.5)
    train.add_arguments(parser, trains=False)


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    known_accelerator(args.gpu)  # before the imports, as all mistakes
    overrides = train.overrides_of(args)
    config = train.matched(load_config(args.config, overrides), args, overrides)
    from elit.training.estimate import estimate

    report = estimate(config, args.gpus, args.gpu, args.mfu)
    return print_report(report, args.json, lambda report: _show(report, config.train.steps))


def _show(report: dict[str, Any], steps: int) -> None:
    print(
        f"{report['model']}: {format_count(report['parameters'])} parameters\n"
        f"training step, batch {report['batch_size']}: "
        f"{in_units(1e12 * report['step_tflops'], 'FLOPs')}\n"
        f"{counted(steps, 'step')}: {in_units(1e18 * report['total_eflops'], 'FLOPs')}\n"
        f"{report['gpus']} x {report['gpu']}, {report['peak_tflops']:g} TFLOP/s each at MFU "
        f"{report['mfu']:g}: {duration(report['step_seconds'])} a step, "
        f"{duration(3600 * report['hours'])} in all"
    )
    digits = 1 if report["memory_gb"] >= 1 else 4
    rows = [
        (what, f"{report[plain]:.{digits}f}", f"{report[checkpointed]:.{digits}f}")
        for what, plain, checkpointed in (
            ("weights, gradients, moments, averages", "state_gb", "state_gb"),
            ("blocks gathered by FSDP", "gathered_gb", "gathered_gb"),
            ("activations", "activations_gb", "checkpointed_gb"),
            ("in all", "memory_gb", "memory_checkpointed_gb"),
        )
        if report[plain]
    ]
    of = f"GB of {report['gpu_gb']:g}, {counted(report['samples'], 'sample')}"
    header = (of, "plain", "checkpointed")
    print(f"\n{format_table(header, rows)}")
