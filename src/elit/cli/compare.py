"""`elit compare`: two swept models side by side, such as a plain and an elastic one."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from elit._files import output_folder, typed_path, write_json, write_text
from elit._tables import format_table
from elit.cli.common import print_report
from elit.cli.flags import Parser

logger = logging.getLogger(__name__)

PAGE = "compare.html"
USAGE = "elit compare A B [--times] [--out FILE] [--json]"
EPILOG = """\
A and B are runs that `elit sweep` has measured, or its sweep.json files. They must have been
compared with the same reference by the same networks, on as many samples of the same seed and
size. Writes a page, and the same numbers as JSON beside it."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit compare`."""
    parser.add("A", "run that was swept, or a sweep.json", typed_path)
    parser.add("B", "run or sweep.json to compare with", typed_path)
    parser.switch("times", "measure both models' times, in turns (default: none are compared)")
    parser.add("device")
    parser.add("out", "page to write", metavar="FILE", default=PAGE)


def run(args: argparse.Namespace) -> int:
    """Read, check, write and print."""
    page = Path(args.out)
    if page.suffix != ".html":
        raise ValueError(f"--out {args.out} is not a page; give a name that ends in .html")
    output_folder(page.parent, "--out")
    from elit.evaluation.comparison import (
        check_comparable,
        compare,
        read_sweeps,
        time_together,
    )

    check_out(page)
    reports = read_sweeps(args.a, args.b)
    check_comparable(reports)
    if args.times:
        time_together(reports, [args.a, args.b], args.device, sys.stderr.isatty())
    report = compare(reports)
    from elit.viz.page import compare_page

    for note in report["notes"]:
        logger.warning(note)
    write_text(page, compare_page(reports, report["ranked_by"], report["notes"]))
    write_json(page.with_suffix(".json"), report)
    return print_report(report, args.json, lambda report: _show(report, reports, page))


def check_out(page: Path) -> None:
    """Raise a ValueError where the JSON file beside the page is no comparison: a sweep, perhaps."""
    file = page.with_suffix(".json")
    if not file.exists():
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        ours = isinstance(earlier, dict) and "models" in earlier
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"--out {page} would write {file}, which is there and no comparison; give another name"
        )


def _show(report: dict[str, Any], reports: dict[str, dict[str, Any]], page: Path) -> None:
    from elit.viz.sweeps import SCORES, in_words, stamp, training_flops

    names, score = list(reports), report["ranked_by"]
    for name, one in reports.items():
        kind = "elastic" if one["model"].get("elastic") else "plain"
        print(f"{name}: {one['model'].get('class', 'model')}, {kind}, {training_flops(one)}")
    print(f"\n{SCORES[score].axis()}: {stamp(reports[names[0]])}\n")
    alike = len({bool(one["model"].get("elastic")) for one in reports.values()}) == 1
    if alike and report["shared"]:
        header = ("both at", *(f"GFLOPs {name}" for name in names), *names)
        lines = [
            (
                in_words(point),
                *(f"{point['gflops_per_image'][name]:.4g}" for name in names),
                *(_number(point["scores"].get(score, {}).get(name)) for name in names),
            )
            for point in report["shared"]
        ]
        print(format_table(header, lines) + "\n")
    header = ("GFLOPs per image, at most", *(word for n in names for word in (n, "with")))
    lines = []
    for line in report["best"]:
        cells: list[Any] = []
        for row in map(line["best"].get, names):
            cells += [None, None] if row is None else [_number(row["scores"][score]), in_words(row)]
        lines.append((f"{line['gflops_per_image']:.4g}", *cells))
    print(f"{format_table(header, lines)}\n\n{page}")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
