"""`elit eval`: scores of one operating point, with all that they depend on."""

import argparse
from pathlib import Path
from typing import Any

from elit._files import write_json
from elit._tables import format_table
from elit.cli.common import print_report
from elit.cli.evaluating import (
    MOST_STEPS,
    add_evaluation_flags,
    home_of,
    interval_of,
    open_evaluation,
    settings_text,
)
from elit.cli.flags import Parser, switch, whole_number
from elit.cli.points import check_run, make_guidance
from elit.flow.words import DEFAULT_STEPS

USAGE = "elit eval RUN [--reference DATA] [--network NAME ...] [--samples N] [flags]"
SAMPLES = 50_000  # as papers have it


def add_arguments(parser: Parser) -> None:
    """Flags of `elit eval`."""
    add_evaluation_flags(parser, SAMPLES)
    parser.add("budget")
    parser.add("steps", type=whole_number(1, MOST_STEPS), default=DEFAULT_STEPS)
    parser.add("guidance", "scale", "guide-budget")
    parser.add("save-npz", **switch("write all samples too, as other evaluation tools read them"))
    parser.add("out", help="folder of the results (default: RUN/evaluated)")
    parser.add("json")


def run(args: argparse.Namespace) -> int:
    """Draw, score, write and tell."""
    check_run(args.run)
    make_guidance(args)  # before the imports: a mistake in a flag is told at once
    home = home_of(args, "evaluated")
    evaluation = open_evaluation(args, home, keep_images=args.save_npz)
    from elit.choosing.points import OperatingPoint
    from elit.evaluation.evaluation import evaluate, save_npz

    given = args.budget, args.steps, args.guidance, args.scale, args.guide_budget
    point = OperatingPoint(*given, interval_of(args))
    point = point.resolved(evaluation.drawing.pipeline.transformer)
    report = evaluate(evaluation, point)
    if report is None:  # the first process tells
        return 0
    folder = evaluation.parts(point).folder
    reference = report["settings"]["reference"]["digest"]  # others keep their results
    report["out"] = str(folder / f"eval-{reference}.json")
    if args.save_npz:
        report["npz"] = str(folder / "samples.npz")
        save_npz(evaluation.parts(point), Path(report["npz"]))
    write_json(Path(report["out"]), report)
    return print_report(report, args.json, _show)


def _show(report: dict[str, Any]) -> None:
    """Scores, and under them what they are of."""
    from elit.choosing.points import OperatingPoint
    from elit.evaluation.score_names import SCORES

    (row,) = report["rows"]
    table = []
    for name in (name for name in SCORES if name in row["scores"]):
        value = f"{row['scores'][name]:.4f}"
        if row["deviations"].get(name):
            value += f" ± {row['deviations'][name]:.4f}"
        better = "lower is better" if SCORES[name][1] else "higher is better"
        table.append((SCORES[name][0], value, row["scores_of"][name], better))
    print(format_table(("score", "value", "network", ""), table))
    for warning in row["warnings"]:
        print(f"! {warning}")
    cost = f"{row['gflops_per_image']:.4g} GFLOPs and {row['ms_per_image']:.1f} ms an image"
    if row["decode_ms_per_image"] >= 0.05:
        cost += f", and {row['decode_ms_per_image']:.1f} ms to decode it"
    point = OperatingPoint.from_dict(row)
    print(f"\n{settings_text(report)}")
    print(f"point      {point}, {row['calls']} calls of the model, {row['sampler']}")
    print(f"cost       {cost}\n\n{report['out']}")
