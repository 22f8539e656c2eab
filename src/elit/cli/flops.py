"""`elit flops`: what a forward and a training step cost, without making the model."""

import argparse
from typing import Any

from elit.cli.common import (
    Parser,
    add_json_flag,
    budget,
    flops_column,
    format_count,
    format_input,
    format_table,
    path_text,
    print_json,
    whole_number,
)

_EPILOG = """\
A multiply-add counts as 2, attention included, of one image or clip and one call of the model."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit flops`."""
    parser.usage = (
        "elit flops NAME_OR_PATH [--resolution R] [--frames N] [--budgets B ...] "
        "[--text-tokens N] [--json]"
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "model",
        type=path_text,
        metavar="NAME_OR_PATH",
        help="a preset, or the folder of a pipeline or a model",
    )
    parser.add_argument(
        "--resolution",
        type=whole_number(1),
        metavar="R",
        help="pixels of an image's side (default: the preset's smallest, or the checkpoint's)",
    )
    parser.add_argument(
        "--frames",
        type=whole_number(1),
        metavar="N",
        help="of a model that draws clips (default: what it was made for)",
    )
    parser.add_argument(
        "--budgets",
        type=budget,
        nargs="+",
        metavar="B",
        help="budgets in (0, 1], such as 1 3/4 0.5 (default: 1 and halves of it)",
    )
    parser.add_argument(
        "--text-tokens",
        type=whole_number(1),
        metavar="N",
        help="length of the text, of a model that draws texts (default: the longest it takes)",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    from elit.cli.models import load_shape
    from elit.cost.flops import flops_report

    shape = load_shape(args.model, args.resolution, args.frames, args.text_tokens)
    report = flops_report(shape.cost, shape.name, shape.resolution, args.budgets, shape.frames)
    if args.json:
        print_json(report)
    else:
        _print_report(report, shape.config)
    return 0


def _print_report(report: dict[str, Any], config: dict[str, Any]) -> None:
    from elit.cost.flops import TRAIN_BATCH, TRAIN_BATCH_MULTI_BUDGET
    from elit.interface.budget import format_budget

    rows = report["rows"]
    size = format_input(report["resolution"], report["frames"], config)
    print(f"{report['model']} at {size}: {format_count(report['parameters'])} parameters\n")
    unit, flops = flops_column([row["gflops"] for row in rows])
    table = [
        (format_budget(row["budget"]), "-" if row["num_latents"] is None else row["num_latents"], n)
        for row, n in zip(rows, flops, strict=True)
    ]
    print(format_table(("budget", "latents per group", f"{unit} per forward"), table))
    if report["text_tokens"] is not None:
        print(f"\nwith a text of {report['text_tokens']} tokens")
    print(f"\ntraining step, batch {TRAIN_BATCH}: {report['train_tflops']:.4g} TFLOPs")
    if report["train_tflops_multi_budget"] is not None:
        print(
            f"multi-budget training step, batch {TRAIN_BATCH_MULTI_BUDGET}: "
            f"{report['train_tflops_multi_budget']:.4g} TFLOPs"
        )
