"""`elit sweep`: quality against cost over budgets, steps and guides, as a table and a page."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from elit._files import locked
from elit._tables import format_table
from elit.cli.common import check_run, print_report
from elit.cli.eval import (
    STEPS,
    add_evaluation_flags,
    home_of,
    interval_of,
    open_evaluation,
    settings_text,
)
from elit.cli.flags import Parser
from elit.flow.words import DEFAULT_SCALE, GUIDANCES

USAGE = "elit sweep RUN [--budgets B ...] [--steps N ...] [--guidance NAME ...] [flags]"


def add_arguments(parser: Parser) -> None:
    """Flags of `elit sweep`."""
    add = parser.add
    add_evaluation_flags(parser, samples=1000)
    add("budgets")
    add("steps", "numbers of steps", STEPS, nargs="+", default=(5, 10, 20, 40))
    add("guidance", f"kinds of guidance: {', '.join(GUIDANCES)} (default: all that the model can)",
        nargs="+", default=None)  # fmt: skip
    add("scale", f"scales of the guidance (default: {DEFAULT_SCALE:g})", nargs="+")
    add("guide-budget", "budgets of the guide, for ag and ccfg (default: the lowest trained)",
        nargs="+")  # fmt: skip
    add("rank-by", "score that the Pareto fronts and `--budget auto` go by (default: the Frechet "
        "distance of the first network)", metavar="SCORE")  # fmt: skip
    add("out", "folder of the results (default: RUN/swept)")


def run(args: argparse.Namespace) -> int:
    """Draw and score all points, write the files, tell what is on the front."""
    check_run(args.run)
    check_guidance(args)
    home = home_of(args, "swept")
    evaluation = open_evaluation(args, home, keep_images=False)
    from elit.evaluation.sweep import Grid, sweep, write_table_and_page
    from elit.interface.budget import default_budgets

    model = evaluation.drawing.pipeline.transformer
    if model.is_elastic:
        budgets = args.budgets or default_budgets(model.min_latents, model.max_latents)
        guides = args.guidance or list(GUIDANCES)
    else:
        budgets, guides = args.budgets or [1.0], args.guidance or ["none", "cfg"]
        if {"ag", "ccfg"} & set(guides):
            raise ValueError("--guidance ag and ccfg need a lower budget; this model has none")
    grid = Grid(
        budgets, args.steps, guides, args.scale or [DEFAULT_SCALE], args.guide_budget or [],
        interval_of(args),
    )  # fmt: skip
    alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if evaluation.process.rank == 0:  # which merges the rows of this call with those that are there
        alone = locked(home, f"another process sweeps into {home}; wait for its end, or give --out")
    with alone:
        report = sweep(evaluation, grid, home, args.rank_by)
        if report is None:  # the first process tells
            return 0
        page = write_table_and_page(report, evaluation, home)
    return print_report(report, args.json, lambda report: _show(report, page))


def check_guidance(args: argparse.Namespace) -> None:
    """Raise a ValueError for a flag of guidance without effect."""
    guides = set(args.guidance or GUIDANCES)
    if 1 in (args.scale or ()):
        raise ValueError("--scale 1 is no guidance, which `--guidance none` is; leave it out")
    for name, needs in (
        ("scale", {"cfg", "ag", "ccfg"}),
        ("interval", {"cfg", "ag", "ccfg"}),
        ("guide_budget", {"ag", "ccfg"}),
    ):
        if getattr(args, name) is not None and not guides & needs:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect with --guidance {' '.join(guides)}; "
                f"add one of {', '.join(sorted(needs))}"
            )


def _show(report: dict[str, Any], page: Path) -> None:
    """What is best at its cost."""
    from elit.choosing.points import OperatingPoint
    from elit.viz.sweeps import SCORES

    ranked_by = report["ranked_by"]
    front = [row for row in report["rows"] if row["front_flops"] or row["front_ms"]]
    front.sort(key=lambda row: row["gflops_per_image"])
    table = [
        (
            str(OperatingPoint.from_dict(row)),
            f"{row['gflops_per_image']:.4g}",
            f"{row['ms_per_image']:.1f}",
            f"{row['scores'][ranked_by]:.4g}",
            " and ".join(cost for cost in ("flops", "ms") if row[f"front_{cost}"]),
        )
        for row in front
    ]
    title = SCORES[ranked_by].title
    header = ("best of their cost", "GFLOPs per image", "ms per image", title, "by")
    print(format_table(header, table))
    print(f"\n{len(front)} of {len(report['rows'])} points")
    print(f"\n{settings_text(report)}\n\n{page}")
