"""A sweep: every budget, step count and guide of a grid, scored, with what each costs."""

import csv
import io
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from elit._choices import check_choice
from elit._files import write_json, write_text
from elit._pareto import pareto_front
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import plain_rows, read_sweep
from elit.evaluation.drawing import SHOWN
from elit.evaluation.evaluation import Evaluation, ranking_score, report, score_points
from elit.evaluation.measure import possible_scores
from elit.evaluation.parts import Parts
from elit.interface.budget import format_budget
from elit.models.elastic import ElasticMixin
from elit.viz.page import sweep_page
from elit.viz.sheet import contact_sheet
from elit.viz.sweeps import in_words

logger = logging.getLogger(__name__)

_MAY_DIFFER = ("device", "device_name", "versions")  # between two calls that fill one sweep


@dataclass(frozen=True)
class Grid:
    """The operating points of a sweep: all combinations that differ."""

    budgets: Sequence[float]  # of the samples
    steps: Sequence[int]  # of the sampler
    guides: Sequence[str]  # of "none", "cfg", "ag" and "ccfg"
    scales: Sequence[float] = (2.0,)  # of guidance
    guide_budgets: Sequence[float] = ()  # of "ag" and "ccfg"; empty is the lowest trained
    interval: tuple[float, float] | None = None  # noise levels in which guidance acts

    def points(self, model: ElasticMixin) -> list[OperatingPoint]:
        """List all operating points, each once, at the budgets that really run.

        A guide with a budget as high as what it guides is left out: of ag it has no effect, of
        ccfg it is cfg, and more would cost more than it guides.
        """

        def numbers(budgets: Sequence[float]) -> list[int]:
            return sorted({model.resolve_budget(budget) or 0 for budget in budgets})

        guided = numbers(self.guide_budgets) or [model.min_latents]
        points = []
        for n, steps, guide, scale in itertools.product(
            reversed(numbers(self.budgets)), self.steps, self.guides, self.scales
        ):
            budget = model.budget_of(n or None)
            if guide == "none":
                points.append(OperatingPoint(budget, steps))
            elif guide == "cfg":
                points.append(OperatingPoint(budget, steps, guide, scale, None, self.interval))
            else:
                low = [
                    None if g is None else model.budget_of(g) for g in guided if g is None or g < n
                ]
                points += [
                    OperatingPoint(budget, steps, guide, scale, b, self.interval) for b in low
                ]
        return list(dict.fromkeys(points))


def sweep(
    evaluation: Evaluation, grid: Grid, out: Path, ranked_by: str | None = None
) -> dict[str, Any] | None:
    """Score all points of a grid; all processes call this, and each may be stopped at any time.

    Rows of an earlier sweep into the same folder with the same settings stay. Points are ranked by
    a score, by default the first network's Frechet distance. The first process gets the report,
    which is in `out` / sweep.json too.
    """
    points = grid.points(evaluation.drawing.pipeline.transformer)
    if not points:
        raise ValueError("no point is left: guides need a lower budget than what they guide")
    check_score(evaluation, ranked_by)
    if evaluation.process.rank == 0:
        earlier_rows(out, evaluation)  # other settings are told before anything is drawn
    drawn = score_points(evaluation, points, "sweep")
    return None if drawn is None else join_sweep(evaluation, drawn, out, ranked_by)


def check_score(evaluation: Evaluation, ranked_by: str | None) -> None:
    """Raise a ValueError for a score that the networks don't give."""
    if ranked_by is not None:
        check_choice(
            ranked_by, possible_scores(evaluation.drawing.networks), "score", " of these networks"
        )


def join_sweep(
    evaluation: Evaluation, drawn: Sequence[dict[str, Any]], out: Path, ranked_by: str | None = None
) -> dict[str, Any]:
    """Put rows among those of `out` / sweep.json, which the first process writes and returns."""
    rows = merged(earlier_rows(out, evaluation), drawn)
    evaluation.add_times(rows)  # all on one device
    scored = [row["scores"] for row in rows if row["scores"]]
    if not scored:
        raise ValueError(f"no point could be drawn: {rows[0]['warnings'][0]}")
    ranked_by = ranked_by or ranking_score(scored[0])
    content = report(evaluation, rows, ranked_by)
    scores = [row["scores"].get(ranked_by) for row in rows]
    for mark, cost in (("front_flops", "gflops_per_image"), ("front_ms", "ms_per_image")):
        front = pareto_front([row[cost] for row in rows], scores, content["lower_is_better"])
        for i, row in enumerate(rows):
            row[mark] = i in front
    write_json(out / "sweep.json", content)
    return content


def earlier_rows(out: Path, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Rows of an earlier sweep with the same settings, or an error if they differ."""
    file = out / "sweep.json"
    if not file.exists():
        return []
    content = read_sweep(file)
    settings, model, rows = content["settings"], content["model"], content["rows"]
    mine = evaluation.settings
    differing = [
        name
        for name in mine
        if name not in _MAY_DIFFER and json.loads(json.dumps(mine[name])) != settings.get(name)
    ]
    for name, what in (("config", "settings of the model"), ("weights", "weights")):
        if model.get(name) != evaluation.model[name]:
            differing.insert(0, what)
    if differing:
        raise ValueError(
            f"{file} is a sweep with other {', '.join(differing)}; choose another folder with "
            f"--out, or remove it"
        )
    return list(rows)


def merged(
    earlier: Iterable[dict[str, Any]], rows: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of both, the later ones instead of earlier ones of the same point, in one order.

    A point stays what searches within other caps found too.
    """
    by_point: dict[OperatingPoint, dict[str, Any]] = {}
    for row in (*earlier, *rows):
        point = OperatingPoint.from_dict(row)
        both = by_point.get(point, {}), row
        known = [one for each in both for one in each.get("searches") or ()]
        searches = {(one.get("max_flops"), one.get("max_ms")): one for one in known}  # by their cap
        by_point[point] = row | ({"searches": [*searches.values()]} if searches else {})

    def order(point: OperatingPoint) -> tuple[Any, ...]:
        guide = ("none", "cfg", "ag", "ccfg").index(point.guidance)
        late = point.budgets_of_steps, point.guide_budgets_of_steps, point.cache
        more = point.scale or 0, point.guide_budget or 0, point.interval or (), str(late)
        return -point.budget, point.steps, guide, *more

    return [by_point[point] for point in sorted(by_point, key=order)]


def write_table_and_page(report: dict[str, Any], evaluation: Evaluation, folder: Path) -> Path:
    """Write sweep.csv and sweep.html; give the page's path."""
    write_text(folder / "sweep.csv", csv_of(report))
    page = folder / "sweep.html"
    write_text(page, sweep_page(report, sheets(report, evaluation)))
    return page


def csv_of(report: dict[str, Any]) -> str:
    """A line for each row; scores as columns."""
    rows = report["rows"]
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    listed = ("interval", "budgets_of_steps", "guide_budgets_of_steps", "cache", "searches")
    kept = list(dict.fromkeys(
        k for row in rows for k, v in row.items() if k in listed or not isinstance(v, dict | list)
    ))  # fmt: skip
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*kept, *scores])
    for row in rows:
        cells = [row.get(key) for key in kept] + [row["scores"].get(name) for name in scores]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return file.getvalue()


def sheets(report: dict[str, Any], evaluation: Evaluation) -> list[tuple[str, Image.Image]]:
    """The same noise at all budgets: a sheet for each guide, at the most steps of the sweep."""
    points = [OperatingPoint.from_dict(row) for row in plain_rows(report)]
    most = max((point.steps for point in points), default=0)
    drawing, found = evaluation.drawing, list[tuple[str, Image.Image]]()

    def add(title: str, drawn: Sequence[OperatingPoint], captions: Sequence[str]) -> None:
        images = [shown_images(evaluation.parts(point)) for point in drawn]
        wanted = [str(drawing.wanted(i)) for i in range(len(images[0]))]
        found.append((title, contact_sheet(images, captions, wanted)))

    front = [row for row in report["rows"] if row.get("front_flops")]
    front.sort(key=lambda row: row["gflops_per_image"])
    front = [r for r in front if not evaluation.parts(OperatingPoint.from_dict(r)).missing()]
    if front:
        add(
            "The Pareto front by FLOPs, the cheapest above: the same noise in each row",
            [OperatingPoint.from_dict(row) for row in front], [in_words(row) for row in front],
        )  # fmt: skip
    for guide in dict.fromkeys(point.guide() for point in points):
        mine = [p for p in points if p.guide() == guide and p.steps == most]
        mine = [p for p in mine if not evaluation.parts(p).missing()]
        if mine:
            captions = [f"budget {format_budget(point.budget)}" for point in mine]
            title = f"Guidance {guide}, {most} steps: a row for each budget, the same noise in each"
            add(title, mine, captions)
    return found


def shown_images(parts: Parts, most: int = SHOWN) -> list[Image.Image]:
    """The first samples as pictures; of clips, their middle frames."""
    images: list[Tensor] = []
    for tensor in parts.read("images"):
        images += tensor[: most - len(images)]
        if len(images) >= most:
            break
    pictures = []
    for image in images:
        still = image if image.ndim == 3 else image[:, image.shape[1] // 2]
        still = still.expand(3, -1, -1) if len(still) == 1 else still
        pictures.append(Image.fromarray(still.movedim(0, -1).to(torch.uint8).contiguous().numpy()))
    return pictures
