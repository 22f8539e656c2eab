"""`elit sweep`: quality against cost over budgets, steps and guides, as a table and a page."""

import argparse
import contextlib
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import locked, write_text
from elit.cli.common import (
    Parser,
    add_json_flag,
    budget,
    format_table,
    number,
    one_of,
    path_text,
    print_json,
    whole_number,
)
from elit.cli.eval import settings_text
from elit.cli.evaluating import (
    EPILOG,
    MOST_STEPS,
    add_evaluation_flags,
    home_of,
    interval_of,
    open_evaluation,
)
from elit.cli.points import DEFAULT_SCALE, check_run
from elit.flow.words import GUIDANCES

if TYPE_CHECKING:
    from PIL import Image

    from elit.evaluation.evaluation import Evaluation

SAMPLES = 1000
STEPS = (5, 10, 20, 40)


def add_arguments(parser: Parser) -> None:
    """Flags of `elit sweep`."""
    parser.usage = "elit sweep RUN [--budgets B ...] [--steps N ...] [--guidance NAME ...] [flags]"
    parser.epilog = EPILOG
    add_evaluation_flags(parser, SAMPLES)
    add = parser.add_argument
    add("--budgets", type=budget, nargs="+", metavar="B",
        help="budgets in (0, 1] (default: 1 and halves of it)")  # fmt: skip
    add("--steps", type=whole_number(1, MOST_STEPS), nargs="+", default=list(STEPS), metavar="N",
        help=f"steps (default: {' '.join(map(str, STEPS))})")  # fmt: skip
    add("--guidance", type=one_of(GUIDANCES, "guidance"), nargs="+", metavar="NAME",
        help="none, cfg, ag, ccfg (default: all that the model can)")  # fmt: skip
    add("--scale", type=number, nargs="+", metavar="S",
        help=f"of guidance (default: {DEFAULT_SCALE:g})")  # fmt: skip
    add("--guide-budget", type=budget, nargs="+", metavar="B",
        help="the guide's budgets, for ag and ccfg (default: the lowest trained)")  # fmt: skip
    add("--rank-by", metavar="SCORE", help="score of the fronts and of budget auto (default: "
        "the Frechet distance of the first network)")  # fmt: skip
    add("--out", type=path_text, metavar="DIR", help="folder of the results (default: RUN/swept)")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Draw and score all points, write the files, tell what is on the front."""
    check_run(args.run)
    check_guidance(args)
    home = home_of(args, "swept")
    evaluation = open_evaluation(args, home, keep_images=False)
    from elit.evaluation.sweep import Grid, sweep
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
        write_files(report, evaluation, home)
    if args.json:
        print_json(report)
    else:
        print_front(report)
        print(f"\n{settings_text(report)}\n\n{home / 'sweep.html'}")
    return 0


def check_guidance(args: argparse.Namespace) -> None:
    """Raise a ValueError for a flag of guidance without effect."""
    guides = set(args.guidance or GUIDANCES)
    if 1 in (args.scale or ()):
        raise ValueError("--scale 1 is no guidance, which `--guidance none` is; leave it out")
    for flag, needs in (
        ("scale", {"cfg", "ag", "ccfg"}),
        ("interval", {"cfg", "ag", "ccfg"}),
        ("guide_budget", {"ag", "ccfg"}),
    ):
        if getattr(args, flag) is not None and not guides & needs:
            raise ValueError(
                f"--{flag.replace('_', '-')} has no effect with --guidance {' '.join(guides)}; "
                f"add one of {', '.join(sorted(needs))}"
            )


def write_files(report: dict[str, Any], evaluation: "Evaluation", home: Path) -> None:
    """The table as CSV, and the page."""
    from elit.evaluation.score_names import SCORES
    from elit.viz.page import sweep_page
    from elit.viz.sweeps import ScoreInfo

    write_text(home / "sweep.csv", csv_of(report))
    scores = {name: ScoreInfo(*about) for name, about in SCORES.items()}
    page = sweep_page(report, scores, sheets(report, evaluation))
    write_text(home / "sweep.html", page)


def csv_of(report: dict[str, Any]) -> str:
    """A line for each row; scores as columns."""
    rows = report["rows"]
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    kept = [k for k, v in rows[0].items() if not isinstance(v, dict | list) or k == "interval"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*kept, *scores])
    for row in rows:
        cells = [row.get(key) for key in kept] + [row["scores"].get(name) for name in scores]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return file.getvalue()


def sheets(report: dict[str, Any], evaluation: "Evaluation") -> list[tuple[str, "Image.Image"]]:
    """The same noise at all budgets: a sheet for each guide, at the most steps of the sweep."""
    from elit.choosing.points import OperatingPoint
    from elit.evaluation.sweep import shown_images
    from elit.interface.budget import format_budget
    from elit.viz.sheet import contact_sheet

    points = [OperatingPoint.from_dict(row) for row in report["rows"]]
    most = max(point.steps for point in points)
    found = []
    for guide in dict.fromkeys(point.guide() for point in points):
        mine = [p for p in points if p.guide() == guide and p.steps == most]
        mine = [p for p in mine if not evaluation.parts(p).missing()]
        if mine:
            images = [shown_images(evaluation.parts(point)) for point in mine]
            captions = [format_budget(point.budget) for point in mine]
            title = f"guidance {guide}, {most} steps: a row for each budget, the same noise in each"
            found.append((title, contact_sheet(images, captions)))
    return found


def print_front(report: dict[str, Any]) -> None:
    """What is best at its cost."""
    from elit.cli.eval import describe_point
    from elit.evaluation.score_names import SCORES

    ranked_by = report["ranked_by"]
    front = [row for row in report["rows"] if row["front_flops"] or row["front_ms"]]
    front.sort(key=lambda row: row["gflops_per_image"])
    table = [
        (
            describe_point(row),
            f"{row['gflops_per_image']:.4g}",
            f"{row['ms_per_image']:.1f}",
            f"{row['scores'][ranked_by]:.4g}",
            " and ".join(cost for cost in ("flops", "ms") if row[f"front_{cost}"]),
        )
        for row in front
    ]
    header = ("best of their cost", "GFLOPs per image", "ms per image", SCORES[ranked_by][0], "by")
    print(format_table(header, table))
    print(f"\n{len(front)} of {len(report['rows'])} points")
