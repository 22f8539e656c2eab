"""The process of a device: loads, measures once, draws batch after batch."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from elit._pareto import pareto_front
from elit.choosing.choose import choose
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import SWEEP_FILE, default_home, plain_rows, read_sweep
from elit.choosing.timing import CallTimes
from elit.flow.words import DEFAULT_SCALE
from elit.interface.budget import default_budgets
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.budgets import draw_batch
from elit.pipelines.folder import check_draws_images
from elit.pipelines.load import open_pipeline
from elit.pipelines.text_pipeline import ElitTextPipeline
from elit.serving.control import Picture, Way
from elit.serving.facts import Facts, Point
from elit.serving.settings import Settings

logger = logging.getLogger(__name__)

_NO_CAP = 1e30
_MOST_KEPT = 1000


def open_served(settings: Settings, device: str) -> ElasticPipeline:
    """The pipeline that is served, or a ValueError if it draws no images."""
    pipeline = open_pipeline(
        settings.run, device, settings.dtype, settings.variant, settings.sampler
    )
    check_draws_images(pipeline, settings.run)
    if pipeline.draws_clips:
        raise ValueError(f"{settings.run} draws clips, but what is served are images")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- facts ----


def find_facts(pipeline: ElasticPipeline, settings: Settings) -> Facts:
    """What a pipeline is, what its calls take here, and what its sweep says of it."""
    model = pipeline.transformer
    least = model.min_latents
    if settings.min_budget is not None:
        least = model.resolve_budget(settings.min_budget) or 0
        if least < model.min_latents:
            raise ValueError(
                f"--min-budget {settings.min_budget:g} keeps {least} latents per group, but this "
                f"model was trained with {model.min_latents} or more"
            )
    sweep = _swept(pipeline, settings)
    start, ladder, front = _start(pipeline, settings, sweep, least)
    start = start.resolved(model)
    halves = default_budgets(model.min_latents, model.max_latents) if model.is_elastic else [1.0]
    kept = {*ladder, *(model.resolve_budget(budget) or 0 for budget in halves)}
    calls, fixed = _times(pipeline, kept, settings)
    points = [OperatingPoint.from_dict(row) for row in sweep.rows]
    runs = [pipeline.calls(**point.arguments()) for point in points]
    all_ms = CallTimes(pipeline, 1).ms_of_runs(runs)
    height, width = pipeline.pixel_size()
    return Facts(
        name=settings.name,
        num_classes=None if model.takes_text else model.config.num_classes,
        labels=getattr(pipeline, "labels", {}),
        max_latents=model.max_latents,
        min_latents=model.min_latents,
        lowest=least,
        size=(width, height),
        way=_way(pipeline, start),
        latents=model.resolve_budget(start.budget) or 0,
        ladder=ladder,
        points=[
            Point(_way(pipeline, p), model.resolve_budget(p.budget) or 0, row["gflops_per_image"],
                  ms, row["score"] if sweep.lower else -row["score"])
            for p, row, ms in zip(points, sweep.rows, all_ms, strict=True)
            if (model.resolve_budget(p.budget) or 0) >= least
        ],
        calls=calls,
        fixed=fixed,
        calls_per_step=len(pipeline.start(start.steps, "cpu")) / start.steps,
        batch_size=settings.batch_size,
        device=str(model.device),
        front=front,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sweep:
    """Rows that have a score, under "score"; or none, and why."""

    rows: Sequence[dict[str, Any]] = ()
    lower: bool = True
    reason: str = "there is no sweep of it"


def _swept(pipeline: ElasticPipeline, settings: Settings) -> _Sweep:
    """The run's sweep; one of other weights or another sampler is none."""
    file = default_home(settings.run) / SWEEP_FILE
    if not file.exists():
        return _Sweep()
    try:
        choose(pipeline, max_flops=_NO_CAP, sweep=file)
        report = read_sweep(file)
    except ValueError as error:
        return _Sweep(reason=" ".join(str(error).split()))
    ranked_by = report["ranked_by"]
    scored = [row | {"score": row["scores"].get(ranked_by)} for row in plain_rows(report)]
    return _Sweep([r for r in scored if r["score"] is not None], report["lower_is_better"], "")


def _start(
    pipeline: ElasticPipeline, settings: Settings, sweep: _Sweep, least: int
) -> tuple[OperatingPoint, list[int], str]:
    """How to draw where a request doesn't say, latents per group to choose from, whence these."""
    model, asked = pipeline.transformer, settings.point()
    rows = [
        row
        for row in sweep.rows
        if all(row.get(name) == value for name, value in asked.items())
        and (model.resolve_budget(row["budget"]) or 0) >= least
    ]
    if rows:
        best = (min if sweep.lower else max)(rows, key=lambda row: row["score"])
        same = ("steps", "guidance", "scale", "guide_budget", "interval")
        rows = [row for row in rows if all(row.get(k) == best.get(k) for k in same)]
        costs, scores = [row["gflops_per_image"] for row in rows], [row["score"] for row in rows]
        front = [rows[i] for i in pareto_front(costs, scores, sweep.lower)]
        ladder = sorted({model.resolve_budget(row["budget"]) or 0 for row in front}, reverse=True)
        return OperatingPoint.from_dict(best), ladder, "the best of its sweep"
    given: dict[str, Any] = {"steps": pipeline.default_steps, "guidance": "none"} | asked
    reason = sweep.reason or "its sweep has no such point"
    point, why = OperatingPoint(1.0, **given), f"the defaults; {reason}"
    if not model.is_elastic:
        return point, [0], why
    kept = [model.resolve_budget(b) for b in default_budgets(least, model.max_latents)]
    return point, sorted({*kept, least}, reverse=True), why


def _way(pipeline: ElasticPipeline, point: OperatingPoint) -> Way:
    model = pipeline.transformer
    if point.guidance == "none":
        return Way(point.steps)
    point = point.resolved(model)
    guide = None if point.guide_budget is None else model.resolve_budget(point.guide_budget)
    scale = DEFAULT_SCALE if point.scale is None else point.scale
    return Way(point.steps, point.guidance, scale, guide, point.interval)


def _times(
    pipeline: ElasticPipeline, latents: set[int], settings: Settings
) -> tuple[dict[int, tuple[float, float]], tuple[float, float]]:
    """Seconds of a forward at each number of latents, and of all else; see Prices."""
    kept = sorted(latents)
    ends = []
    for count in (1, settings.batch_size):
        times = CallTimes(pipeline, count)
        # Runs of one call, and of none: what remains is what a run takes beside its calls.
        ms = times.ms_of_runs([[((n or None, 1),)] for n in kept])
        (start,) = times.ms_of_runs([[]])
        decode = times.decode_ms_per_image()
        ends.append([count * x / 1000 for x in (*(m - start for m in ms), start + decode)])
    pairs = [(max(0.0, one), max(0.0, one, most)) for one, most in zip(*ends, strict=True)]
    return dict(zip(kept, pairs[:-1], strict=True)), pairs[-1]


# ---- drawing ----


@dataclass
class Worker:
    """Draws batches with a pipeline."""

    pipeline: ElasticPipeline
    calls: dict[tuple[Way, int], list[Any]] = field(default_factory=dict)

    def draw(self, pictures: Sequence[Picture], latents: Sequence[int]) -> list[dict[str, Any]]:
        """What each picture became, or why it didn't; none fails for another."""
        try:
            return self._draw(pictures, latents)
        except Exception as error:  # one bad picture: find out which
            if len(pictures) > 1:
                pairs = zip(pictures, latents, strict=True)
                return [self.draw([picture], [kept])[0] for picture, kept in pairs]
            if isinstance(error, ValueError):
                return [{"error": " ".join(str(error).split()), "status": 400}]
            logger.exception("a picture failed")
            return [{"error": f"drawing failed: {type(error).__name__}", "status": 500}]

    def _draw(self, pictures: Sequence[Picture], latents: Sequence[int]) -> list[dict[str, Any]]:
        model, way = self.pipeline.transformer, pictures[0].way
        tokens = None
        if isinstance(self.pipeline, ElitTextPipeline):
            texts = [str(text) for p in pictures for text in (p.what, p.negative or "")]
            tokens = self.pipeline.check_prompt(texts)
        images = draw_mixed(self.pipeline, pictures, latents)
        gflops = {n: self._gflops(way, n, tokens) for n in set(latents)}
        drawn = []
        for picture, kept, image in zip(pictures, latents, images, strict=True):
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=1)
            drawn.append({
                "b64_json": base64.b64encode(file.getvalue()).decode(),
                "seed": picture.seed, "budget": model.budget_of(kept or None),
                "num_latents": kept or None, "gflops": gflops[kept], "steps": way.steps,
                "guidance": way.guidance,
            })  # fmt: skip
        return drawn

    def _gflops(self, way: Way, latents: int, tokens: int | None) -> float:
        """Of a picture, all forwards; kept, as listing a run's calls tries the scheduler out."""
        key = way, latents
        if key not in self.calls:
            if len(self.calls) > _MOST_KEPT:
                self.calls.clear()
            point = _point(self.pipeline, way, latents)
            self.calls[key] = self.pipeline.calls(**point.arguments())
        cost = self.pipeline.forward_cost(text_tokens=tokens)
        return sum(cost.flops(n) * times for call in self.calls[key] for n, times in call) / 1e9


def draw_mixed(
    pipeline: ElasticPipeline, pictures: Sequence[Picture], latents: Sequence[int]
) -> list[Any]:
    """Pictures of one way in one call, at their own budgets, each from its own seed."""
    point = _point(pipeline, pictures[0].way, latents[0])
    options: dict[str, Any] = {
        "num_inference_steps": point.steps,
        "guidance": point.make_guidance(),
        "num_latents": [*latents] if pipeline.transformer.is_elastic else None,
    }
    if any(picture.negative for picture in pictures):
        options["negative_prompt"] = [picture.negative or "" for picture in pictures]
    what, seeds = [p.what for p in pictures], [p.seed for p in pictures]
    return list(draw_batch(pipeline, what, seeds, **options))


def _point(pipeline: ElasticPipeline, way: Way, latents: int) -> OperatingPoint:
    budget_of = pipeline.transformer.budget_of
    guide = None if way.guide_latents is None else budget_of(way.guide_latents)
    budget = budget_of(latents or None)
    return OperatingPoint(budget, way.steps, way.guidance, way.scale, guide, way.interval)
