"""`elit sweep`: quality against cost over budgets, steps and guides, as a table and a page."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from elit.cli.flags import Parser, WholeNumber, number
from elit.flow.words import DEFAULT_SCALE, GUIDANCES

if TYPE_CHECKING:
    from elit.evaluation.evaluation import Evaluation
    from elit.evaluation.sweep import Grid

STEP_COUNTS = (5, 10, 20, 40)  # of a grid
USAGE = "elit sweep RUN [--budgets B ...] [--steps N ...] [--guidance NAME ...] [flags]"


def add_arguments(parser: Parser) -> None:
    """Flags of `elit sweep`."""
    add = parser.add
    add_evaluation_flags(parser, samples=1000)
    add("budgets")
    add("steps", "numbers of steps (default: 5 10 20 40, or the few that the model was trained "
        "for; of --search 1.25 to 3 times those that full budget has, up to 100)", STEPS,
        nargs="+", default=None)  # fmt: skip
    add("guidance", f"kinds of guidance: {', '.join(GUIDANCES)} (default: all that the model "
        "can, none if it has learned one)",
        nargs="+", default=None)  # fmt: skip
    add("scale", f"scales of the guidance (default: {DEFAULT_SCALE:g})", nargs="+")
    add("guide-budget", "budgets of the guide, for ag and ccfg (default: the lowest trained)",
        nargs="+")  # fmt: skip
    add("rank-by", "score that the Pareto fronts and `--budget auto` go by (default: the Frechet "
        "distance of the first network)", metavar="SCORE")  # fmt: skip
    parser.switch("search", "instead of a grid, search steps, budgets over the steps and a step "
                  "cache within each cap, starting from `elit schedule RUN`")  # fmt: skip
    add("max-gflops", "caps of --search on an image's GFLOPs", number, "G", nargs="+", default=[])
    add("max-ms", "caps of --search on an image's milliseconds on this device, drawn --batch-size "
        "at a time", number, "MS", nargs="+", default=[])  # fmt: skip
    add("moves", "candidates of all samples that --search tries after those it starts from, for "
        "each cap (default: 16)", WholeNumber(0), default=None)  # fmt: skip
    add("out", "folder of the results (default: RUN/swept)")


def run(args: argparse.Namespace) -> int:
    """Draw and score all points, write the files, tell what is on the front."""
    check_run(args.run)
    check_guidance(args)
    check_search(args)
    home = home_of(args, "swept")
    evaluation = open_evaluation(args, home, keep_images=False)
    from elit.evaluation.sweep import sweep, write_table_and_page

    grid = None if args.search else grid_of(args, evaluation.drawing.pipeline)
    alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if evaluation.process.rank == 0:  # which merges the rows of this call with those that are there
        alone = locked(home, f"another process sweeps into {home}; wait for its end, or give --out")
    with alone:
        report = (
            search_caps(args, evaluation, home)
            if grid is None
            else sweep(evaluation, grid, home, args.rank_by)
        )
        if report is None:  # the first process tells
            return 0
        page = write_table_and_page(report, evaluation, home)
    return print_report(report, args.json, lambda report: _show(report, page))


def grid_of(args: argparse.Namespace, pipeline: Any) -> "Grid":
    """All points that the flags name."""
    model, few = pipeline.transformer, pipeline.few_steps
    guides = guides_of(args, pipeline)
    from elit.evaluation.sweep import Grid
    from elit.interface.budget import default_budgets

    if model.is_elastic:
        budgets = args.budgets or default_budgets(model.min_latents, model.max_latents)
    else:
        budgets, guides = args.budgets or [1.0], args.guidance or guides[:2]
        if {"ag", "ccfg"} & set(guides):
            raise ValueError("--guidance ag and ccfg need a lower budget; this model has none")
    steps = args.steps or ([few] if few else STEP_COUNTS)
    return Grid(
        budgets, steps, guides, args.scale or [DEFAULT_SCALE], args.guide_budget or [],
        interval_of(args),
    )  # fmt: skip


def guides_of(args: argparse.Namespace, pipeline: Any) -> list[str]:
    """Those that are given, else all; none for a model that has learned a guidance of its own."""
    asks = any(x is not None for x in (args.scale, args.guide_budget, args.interval))
    own = ["none"] if pipeline.learned_guidance and not asks else list(GUIDANCES)
    return args.guidance or own


def search_caps(args: argparse.Namespace, evaluation: "Evaluation", home: Path) -> dict[str, Any]:
    """Search within each cap; what was found joins the sweep."""
    from elit.evaluation.sweep import earlier_rows, join_sweep
    from elit.flow.guidance import CFG
    from elit.inspection.inspector import check_elastic
    from elit.scheduling.schedule import load_schedule
    from elit.scheduling.search import MOVES, search

    check_elastic(evaluation.drawing.pipeline.transformer, args.run)
    schedule = load_schedule(args.run)
    earlier_rows(home, evaluation)  # other settings are told before anything is drawn
    guidance = None
    if guides_of(args, evaluation.drawing.pipeline) != ["none"]:
        guidance = CFG((args.scale or [DEFAULT_SCALE])[0], interval_of(args) or (0.0, 1.0))
    caps = [{"max_flops": g * 1e9} for g in args.max_gflops] + [{"max_ms": m} for m in args.max_ms]
    rows: list[dict[str, Any]] = []
    for cap in caps:
        rows += search(
            evaluation, schedule, **cap, guidance=guidance, steps=args.steps or (),
            moves=MOVES if args.moves is None else args.moves, ranked_by=args.rank_by,
        ).rows  # fmt: skip
    return join_sweep(evaluation, rows, home, args.rank_by)


def check_search(args: argparse.Namespace) -> None:
    """Raise a ValueError for flags that --search, or a grid, has no use for."""
    caps = [*args.max_gflops, *args.max_ms]
    if not args.search:
        if caps or args.moves is not None:
            raise ValueError("--max-gflops, --max-ms and --moves are of --search; add it")
        return
    if not caps:
        raise ValueError("--search needs a cap; add --max-gflops or --max-ms")
    if min(caps) <= 0:
        raise ValueError(f"a cap of {min(caps):g} is not allowed; give positive numbers")
    if args.budgets is not None:
        raise ValueError("--search chooses the budgets; leave --budgets out")
    if args.guidance not in (None, ["none"], ["cfg"]) or len(args.scale or ()) > 1:
        raise ValueError(
            "--search plans the guide's budgets, of one guidance: give --guidance none, or cfg and "
            "one --scale"
        )
    if args.guide_budget is not None:
        raise ValueError("--search chooses the guide's budgets; leave --guide-budget out")


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
