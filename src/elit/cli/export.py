"""`elit export`: a pipeline's model as one file that runs without elit, at any budget."""

import argparse
from typing import Any

from elit._files import output_folder
from elit._tables import format_table
from elit.choosing.sweep_file import default_home
from elit.cli.common import check_run, open_pipeline, print_report
from elit.cli.flags import OWN_STEPS, OneOf, Parser
from elit.exporting.formats import SUFFIXES, check_format
from elit.flow.words import DEFAULT_STEPS
from elit.interface.budget import format_budget

USAGE = "elit export RUN --format FORMAT [flags]"
EPILOG = """\
Writes transformer.onnx, .aoti.pt2 or .pt2, and beside it a .json that says what goes in and how to
draw. Batch and budget are free in one file; the size of the images is not. The file is compared
with the model before it gets its name. examples/run_export.py draws with it."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit export`."""
    parser.add("RUN variant")
    parser.add("format", "format: {}", OneOf(SUFFIXES, "format"), "FORMAT", required=True)
    parser.add("steps", f"steps whose noise levels the .json has {OWN_STEPS.format(DEFAULT_STEPS)}")
    parser.add("size frames device dtype")
    parser.add("out", "folder to write into (default: RUN/export)")
    parser.set_defaults(sampler=None)


def run(args: argparse.Namespace) -> int:
    """Export, compare and tell."""
    check_run(args.run)
    check_format(args.format, args.device, args.dtype)
    folder = output_folder(args.out or default_home(args.run) / "export", "--out")
    if args.format == "onnx":
        args.device = "cpu"
    pipeline = open_pipeline(args)
    from elit.exporting.export import export

    size = pipeline.input_size(args.frames, *(args.size or (None, None)))
    report = export(pipeline, args.format, folder, size, args.steps)
    report = {"out": str(folder / report["file"]), **report}
    return print_report(report, args.json, _show)


def _show(report: dict[str, Any]) -> None:
    columns = ("batch", "budget", "latents", "difference", "eager ms", "ms")
    rows = [
        (
            row["batch"], format_budget(row["budget"]), row["num_latents"] or "-",
            f"{row['difference']:.1e}", f"{row['eager_ms']:.1f}", f"{row['ms']:.1f}",
        )
        for row in report["checks"]
    ]  # fmt: skip
    print(format_table(columns, rows))
    print(f"\n{report['out']}, {report['bytes'] / 1e6:.1f} MB, and its .json beside it")
