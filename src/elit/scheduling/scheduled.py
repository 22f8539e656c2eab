"""What `--budget schedule` draws by: what a search found for the cap, else a derived plan."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from elit.choosing.choose import check_is_of, check_texts
from elit.choosing.points import OperatingPoint, guided_by
from elit.choosing.sweep_file import SWEEP_FILE, default_home, read_sweep
from elit.choosing.timing import times_of
from elit.flow.guidance import Guidance
from elit.inspection.inspector import check_elastic
from elit.pipelines.base import ElasticPipeline
from elit.scheduling.schedule import load_schedule, one_cap

logger = logging.getLogger(__name__)

_NEAR = 0.9  # of a cap, that a search may have had instead
_ROUNDING = 1 + 1e-9  # costs are sums


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

    A search has one for caps from its own on, up to a ninth above it, and of a cap on time if it
    keeps within that here too. It chose the number of steps as well: where another one is asked
    for, budgets are derived.

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
    within, file = one_cap(max_flops, max_ms), default_home(run) / SWEEP_FILE
    check_elastic(pipeline.transformer, run)
    if file.exists():
        report = read_sweep(file)
        found = _searched(report, within, guidance, num_inference_steps)
        try:
            if found:
                check_is_of(report, file, pipeline, run, size)
            if found and max_flops is not None:
                check_texts(report, file, pipeline, what)
        except ValueError as error:
            logger.warning("no searched plan is taken: %s", error)
            found = []
        if found and max_ms is not None:  # of this batch, on this device
            ms = times_of(pipeline, what, size).ms_of_points([point for *_, point in found])
            found = [one for one, its in zip(found, ms, strict=True) if its <= max_ms * _ROUNDING]
        if found:
            score, _, point = found[0]
            logger.info("searched: %s, %s %.4g", point, report["ranked_by"], score)
            return point
    plan = load_schedule(run).plan(
        pipeline, max_flops, max_ms, guidance, num_inference_steps, what=what, size=size
    )
    logger.info("derived: no search of this cap; `elit sweep RUN --search` makes one")
    return plan.point()


def _searched(
    report: Mapping[str, Any], within: Mapping[str, float], guidance: Guidance | None,
    steps: int | None,
) -> list[tuple[float, int, OperatingPoint]]:  # fmt: skip
    """Score, row and point of what searches of this cap found, the best first."""
    ((name, cap),), guided = within.items(), guided_by(guidance)
    found = []
    for i, row in enumerate(report["rows"]):
        caps = [one.get(name, math.inf) for one in row.get("searches") or () if one.get("best")]
        point, score = OperatingPoint.from_dict(row), row["scores"].get(report["ranked_by"])
        is_for = any(_NEAR * cap <= own <= cap * _ROUNDING for own in caps)
        is_asked = steps in (None, point.steps) and guided.items() <= vars(point).items()
        if is_for and is_asked and score is not None:
            found.append((score, i, point))
    sign = 1 if report["lower_is_better"] else -1
    return sorted(found, key=lambda one: (sign * one[0], one[1]))
