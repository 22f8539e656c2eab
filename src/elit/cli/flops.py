"""`elit flops`: what a forward and a training step cost, without making the model."""

import argparse
from typing import Any

from elit._tables import format_table
from elit.cli.common import flops_column, format_count, print_report
from elit.cli.flags import Parser, WholeNumber
from elit.cost.flops import TRAIN_BATCH, TRAIN_BATCH_MULTI_BUDGET, flops_report
from elit.interface.budget import format_budget
from elit.pipelines.shapes import load_shape

USAGE = (
    "elit flops NAME_OR_PATH [--resolution R] [--frames N] [--budgets B ...] [--text-tokens N] "
    "[--json]"
)
EPILOG = """\
A multiply-add counts as 2, attention included, of one image or clip and one call of the model."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit flops`."""
    size = "pixels of an image's side (default: the preset's smallest, or the checkpoint's)"
    text = "length of the text, with a model that draws texts (default: the longest it takes)"
    parser.add("NAME_OR_PATH")
    parser.add("resolution", size)
    parser.add("frames budgets")
    parser.add("text-tokens", text, WholeNumber())


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    shape = load_shape(args.model, args.resolution, args.frames, args.text_tokens)
    report = flops_report(shape.cost, shape.name, shape.resolution, args.budgets, shape.frames)
    return print_report(report, args.json, lambda report: _show(report, shape.input_size))


def _show(report: dict[str, Any], size: str) -> None:
    rows = report["rows"]
    print(f"{report['model']} at {size}: {format_count(report['parameters'])} parameters\n")
    unit, flops = flops_column([row["gflops"] for row in rows])
    table = [
        (format_budget(row["budget"]), row["num_latents"], n)
        for row, n in zip(rows, flops, strict=True)
    ]
    print(format_table(("budget", "latents per group", f"{unit} per forward"), table))
    if report["text_tokens"] is not None:
        print(f"\nwith a text of {report['text_tokens']} tokens")
    print(f"\ntraining step, batch {TRAIN_BATCH}: {report['train_tflops']:.4g} TFLOPs")
    if report["latents_drawn"] is not None:
        least, most = report["latents_drawn"]
        print(
            f"multi-budget training step, batch {TRAIN_BATCH_MULTI_BUDGET}: "
            f"{report['train_tflops_as_drawn']:.4g} TFLOPs, mean of {least} to {most} latents"
        )
        if least > 1:
            print(
                f"as the paper counts it, mean of 1 to {most} latents: "
                f"{report['train_tflops_multi_budget']:.4g} TFLOPs"
            )
