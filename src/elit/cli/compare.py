"""`elit compare`: two swept models side by side, such as a plain and an elastic one."""

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import write_json, write_text
from elit.cli.common import (
    Parser,
    add_json_flag,
    format_table,
    output_folder,
    path_text,
    print_json,
)

if TYPE_CHECKING:
    from elit.viz.sweeps import Rows, ScoreInfo

logger = logging.getLogger(__name__)

PAGE = "compare.html"
_EPILOG = """\
A and B are runs that `elit sweep` has measured, or its sweep.json files. They must have been
compared with the same reference by the same networks, on as many samples of the same seed and
size. Writes a page, and the same numbers as JSON beside it."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit compare`."""
    parser.usage = "elit compare A B [--out FILE] [--json]"
    parser.epilog = _EPILOG
    parser.add_argument("a", type=path_text, metavar="A", help="a swept run, or a sweep.json")
    parser.add_argument("b", type=path_text, metavar="B", help="the other")
    parser.add_argument(
        "--out",
        type=path_text,
        default=PAGE,
        metavar="FILE",
        help=f"the page to write (default: {PAGE})",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Read, check, write and print."""
    page = Path(args.out)
    if page.suffix != ".html":
        raise ValueError(f"--out {args.out} is not a page; give a name that ends in .html")
    output_folder(page.parent, "--out")
    from elit.evaluation.comparison import check_comparable, notes_on, ranking_of, read_sweeps
    from elit.evaluation.score_names import SCORES

    check_out(page)
    reports = read_sweeps(args.a, args.b)
    check_comparable(reports)
    from elit.viz.page import compare_page
    from elit.viz.sweeps import Rows, ScoreInfo

    score = ranking_of(reports)
    notes = notes_on(reports)
    for note in notes:
        logger.warning(note)
    infos = {name: ScoreInfo(*about) for name, about in SCORES.items()}
    infos = {score: infos.pop(score), **infos}
    rows = Rows(reports)
    found = report_of(reports, rows, score, infos[score], notes)
    write_text(page, compare_page(reports, infos, notes=notes))
    write_json(page.with_suffix(".json"), found)
    if args.json:
        print_json(found)
    else:
        _print(found, reports, infos[score])
        print(f"\n{page}")
    return 0


def check_out(page: Path) -> None:
    """Raise a ValueError where the JSON file beside the page is no comparison: a sweep, perhaps."""
    file = page.with_suffix(".json")
    if not file.exists():
        return
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        ours = isinstance(kept, dict) and "models" in kept
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"--out {page} would write {file}, which is there and no comparison; give another name"
        )


def report_of(
    reports: dict[str, dict[str, Any]],
    rows: "Rows",
    score: str,
    info: "ScoreInfo",
    notes: list[str],
) -> dict[str, Any]:
    """What the JSON file holds."""
    from elit.evaluation.comparison import differences, shared_points
    from elit.viz.sweeps import best_at_costs

    differing = differences(reports)
    settings = next(iter(reports.values()))["settings"]
    best = [
        {
            "gflops_per_image": cost,
            "best": {name: None if i is None else rows.rows[i] for name, i in places.items()},
        }
        for cost, places in best_at_costs(rows, score, info)
    ]
    return {
        "format": 1,
        "models": {name: report["model"] for name, report in reports.items()},
        "settings": {key: value for key, value in settings.items() if key not in differing},
        "differences": differing,
        "ranked_by": score,
        "lower_is_better": info.lower_is_better,
        "notes": notes,
        "shared": shared_points(reports),
        "best": best,
    }


def _print(found: dict[str, Any], reports: dict[str, dict[str, Any]], info: "ScoreInfo") -> None:
    from elit.viz.sweeps import in_words, stamp, training_flops

    names, score = list(reports), found["ranked_by"]
    for name, report in reports.items():
        kind = "elastic" if report["model"].get("elastic") else "plain"
        print(f"{name}: {report['model'].get('class', 'model')}, {kind}, {training_flops(report)}")
    print(f"\n{info.axis()}: {stamp(reports[names[0]])}\n")
    alike = len({bool(report["model"].get("elastic")) for report in reports.values()}) == 1
    if alike and found["shared"]:
        header = ("both at", *(f"GFLOPs {name}" for name in names), *names)
        lines = [
            (
                in_words(point),
                *(f"{point['gflops_per_image'][name]:.4g}" for name in names),
                *(_number(point["scores"][score][name]) for name in names),
            )
            for point in found["shared"]
        ]
        print(format_table(header, lines) + "\n")
    header = ("GFLOPs per image, at most", *(word for n in names for word in (n, "with")))
    lines = []
    for line in found["best"]:
        cells = []
        for name in names:
            row = line["best"][name]
            cells += ["-", "-"] if row is None else [_number(row["scores"][score]), in_words(row)]
        lines.append((f"{line['gflops_per_image']:.4g}", *cells))
    print(format_table(header, lines))


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
