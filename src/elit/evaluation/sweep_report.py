"""A sweep's report as a table and as a page."""

import csv
import io
from pathlib import Path
from typing import Any

from PIL import Image

from elit._files import write_text
from elit.choosing.points import OperatingPoint
from elit.evaluation.evaluation import Evaluation
from elit.evaluation.score_names import score_infos
from elit.evaluation.sweep import shown_images
from elit.interface.budget import format_budget
from elit.viz.page import sweep_page
from elit.viz.sheet import contact_sheet


def write_table_and_page(report: dict[str, Any], evaluation: Evaluation, folder: Path) -> Path:
    """Write sweep.csv and sweep.html; give the page's path."""
    write_text(folder / "sweep.csv", csv_of(report))
    page = folder / "sweep.html"
    write_text(page, sweep_page(report, score_infos(), sheets(report, evaluation)))
    return page


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


def sheets(report: dict[str, Any], evaluation: Evaluation) -> list[tuple[str, Image.Image]]:
    """The same noise at all budgets: a sheet for each guide, at the most steps of the sweep."""
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
