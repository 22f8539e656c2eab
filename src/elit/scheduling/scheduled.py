"""What `--budget schedule` draws by: what a search found for the cap, else a derived plan."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from elit.choosing.choose import check_is_of
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import SWEEP_FILE, default_home, read_sweep
from elit.choosing.timing import device_name
from elit.flow.guidance import WHOLE, Guidance
from elit.pipelines.base import ElasticPipeline
from elit.scheduling.schedule import load_schedule

logger = logging.getLogger(__name__)

_NEAR = 0.9  # of a cap, that a search may have had instead


def scheduled_point(
    run: str,
    pipeline: ElasticPipeline,
    max_flops: float | None = None,
    max_ms: float | None = None,
    guidance: Guidance | None = None,
    num_inference_steps: int | None = None,
    what: int | str | Sequence[Any] = 1,
    size: Sequence[int | None] = (None, None, None),
) -> OperatingPoint:
    """The best that `elit sweep --search` found for a cap, else the plan of `elit schedule`.

    A search has one for caps from its own on, up to a ninth above it. It chose the number of steps
    too: where another one is asked for, budgets are derived.

    Args:
        run: folder of the pipeline.
        pipeline: on its device, with the sampler to draw by.
        max_flops: as `Schedule.plan` takes it, and so are all others.
        max_ms: likewise.
        guidance: likewise.
        num_inference_steps: likewise.
        what: likewise.
        size: likewise.
    """
    within = {k: x for k, x in (("max_flops", max_flops), ("max_ms", max_ms)) if x is not None}
    file = default_home(run) / SWEEP_FILE
    if len(within) == 1 and file.exists():
        report = read_sweep(file)
        sign = 1 if report["lower_is_better"] else -1
        found = []
        for i, row in enumerate(report["rows"]):
            point, score = OperatingPoint.from_dict(row), row["scores"].get(report["ranked_by"])
            fits = _is_for(row, within) and _guides_alike(point, guidance)
            if fits and score is not None and num_inference_steps in (None, point.steps):
                found.append((sign * score, i, point))
        if found and _is_of(report, pipeline, run, size, within):
            score, _, point = min(found)
            logger.info("searched: %s, %s %.4g", point, report["ranked_by"], sign * score)
            return point
    plan = load_schedule(run).plan(
        pipeline, max_flops, max_ms, guidance, num_inference_steps, what=what, size=size
    )
    logger.info("derived: no search of this cap; `elit sweep RUN --search` makes one")
    return plan.point()


def _is_for(row: Mapping[str, Any], within: Mapping[str, float]) -> bool:
    ((name, cap),) = within.items()
    caps = (one.get(name, math.inf) for one in row.get("searches") or () if one.get("best"))
    return any(_NEAR * cap <= own <= cap * (1 + 1e-9) for own in caps)


def _guides_alike(point: OperatingPoint, guidance: Guidance | None) -> bool:
    if guidance is None or point.guidance == "none":
        return guidance is None and point.guidance == "none"
    interval = None if guidance.interval == WHOLE else guidance.interval
    return (point.scale, point.interval) == (guidance.scale, interval)


def _is_of(
    report: dict[str, Any], pipeline: ElasticPipeline, run: str,
    size: Sequence[int | None], within: Mapping[str, float],
) -> bool:  # fmt: skip
    """Whether a sweep is of these weights, sampler and size, and times of this device."""
    try:
        check_is_of(report, SWEEP_FILE, pipeline, run, size)
    except ValueError as error:
        logger.warning("no searched plan is taken: %s", error)
        return False
    device = report["settings"].get("device_name")
    return "max_ms" not in within or device == device_name(pipeline.transformer.device)
