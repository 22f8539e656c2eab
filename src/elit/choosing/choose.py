"""The best way to draw that a sweep measured and that keeps within a cap."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elit._files import digest_of
from elit._numbers import is_real
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import SWEEP_FILE, default_home, read_sweep
from elit.choosing.timing import describe, times_of
from elit.interface.fit import format_size
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.folder import weights_digest

logger = logging.getLogger(__name__)

_UNITS = {"max_flops": (1e9, "GFLOPs"), "max_ms": (1, "ms")}


def choose(
    pipeline: ElasticPipeline,
    max_flops: float | None = None,
    max_ms: float | None = None,
    num_inference_steps: int | None = None,
    what: int | str | Sequence[Any] = 1,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    sweep: str | os.PathLike | None = None,
) -> OperatingPoint:
    """The best point of a sweep whose cost for an image keeps within the caps.

    Of equal scores it is the cheapest. Draw by `pipeline(labels, **point.arguments())`.

    Args:
        pipeline: on its device, with the sampler that was swept.
        max_flops: operations for an image, all calls, a multiply-add as 2; VAE apart.
        max_ms: milliseconds for an image, measured on this device at the first call; VAE apart.
        num_inference_steps: only points of so many steps.
        what: labels or texts of a batch, or their number: the time for each depends on it.
        height: of the images, in pixels; by default what the model was made for.
        width: likewise.
        num_frames: of clips, likewise.
        sweep: `sweep.json` or its folder; by default where `elit sweep` writes it, in the folder
            that the pipeline was loaded from.
    """
    caps = {k: x for k, x in (("max_flops", max_flops), ("max_ms", max_ms)) if x is not None}
    if not caps:
        raise ValueError("a choice needs a cap; give max_flops=, max_ms=, or both")
    for name, cap in caps.items():
        if not (is_real(cap) and cap > 0):
            raise ValueError(f"{name}={cap!r:.40} is not allowed; give a positive number")
    name = str(pipeline.config.get("_name_or_path") or "")
    file = default_home(name) / SWEEP_FILE if sweep is None else sweep
    if sweep is None and not (name and Path(file).exists()):
        raise ValueError(
            f"a choice needs what `elit sweep` measured, but there is no {file}; run "
            f"`elit sweep {name or 'RUN'}`, or name its file with sweep= (of a command, --sweep)"
        )
    report, size = read_sweep(file), (num_frames, height, width)
    check_is_of(report, file, pipeline, name, size)
    if max_flops is not None:
        check_texts(report, file, pipeline, what)
    ranked_by, rows = report["ranked_by"], _rows(report, file, num_inference_steps)
    points = [OperatingPoint.from_dict(row) for row in rows]
    costs: dict[str, list[float]] = {}  # of each cap, by row
    if max_flops is not None:
        costs["max_flops"] = [row["gflops_per_image"] * 1e9 for row in rows]
    if max_ms is not None:
        times = times_of(pipeline, what, size)
        costs["max_ms"] = times.ms_of_points(points)
    each = [dict(zip(caps, row, strict=True)) for row in zip(*costs.values(), strict=True)]
    sign = 1 if report["lower_is_better"] else -1
    within = [
        (sign * row["scores"][ranked_by], tuple(cost.values()), i)
        for i, (row, cost) in enumerate(zip(rows, each, strict=True))
        if all(cost[name] <= cap for name, cap in caps.items())
    ]
    limits = in_words(caps)
    if not within:
        i = min(range(len(each)), key=lambda i: tuple(each[i].values()))
        raise ValueError(
            f"no point of {file} keeps within {limits}; the cheapest is {points[i]}, at "
            f"{in_words(each[i])}"
        )
    score, _, i = min(within)
    for warning in rows[i].get("warnings") or ():
        logger.warning("%s, which that choice is by: %s", ranked_by, warning)
    logger.info(
        "chose %s: %s %.4g, the best of %d points within %s; it costs %s",
        points[i], ranked_by, sign * score, len(points), limits, in_words(each[i]),
    )  # fmt: skip
    return points[i]


def _rows(report: dict[str, Any], file: Any, steps: int | None) -> list[dict[str, Any]]:
    """Rows that have a score, of a number of steps if one is given."""
    ranked_by = report["ranked_by"]
    rows = [row for row in report["rows"] if row["scores"].get(ranked_by) is not None]
    if not rows:
        raise ValueError(f"{file} has no row with a {ranked_by}; run `elit sweep` to its end")
    known = sorted({row["steps"] for row in rows})
    if steps is not None and steps not in known:
        raise ValueError(
            f"{file} has no point of {steps} steps; it has those of {', '.join(map(str, known))}"
        )
    return [row for row in rows if steps in (None, row["steps"])]


def check_is_of(
    report: dict[str, Any],
    file: Any,
    pipeline: ElasticPipeline,
    name: str,
    size: Sequence[int | None],
) -> None:
    """Raise a ValueError for a sweep of other weights, another sampler or another size."""
    settings, sampler = report["settings"], type(pipeline.scheduler).__name__
    measured, weights = report["model"]["weights"], weights_digest(Path(name)) if name else None
    if measured and weights and measured != weights:
        raise ValueError(
            f"{file} is of other weights than {name} holds now; run `elit sweep` again"
        )
    if settings["sampler"] != sampler:
        raise ValueError(
            f"{file} was measured with {settings['sampler']}, but this pipeline has a {sampler}; "
            f"set that scheduler, or sweep with this one"
        )
    if settings.get("sampler_settings") not in (None, digest_of(describe(pipeline.scheduler))):
        raise ValueError(f"{file} was measured with other settings of the {sampler}; sweep again")
    default = pipeline.pixel_size()
    asked = [a or d for a, d in zip(size[-len(default) :], default, strict=True)]
    if asked != settings["size"]:
        raise ValueError(
            f"{file} was measured at {format_size(settings['size'])}, not at "
            f"{format_size(asked)}; sweep at that size, or give a budget"
        )


def check_texts(report: dict[str, Any], file: Any, pipeline: ElasticPipeline, what: Any) -> None:
    """Raise a ValueError for texts that are longer than those whose FLOPs a sweep has."""
    tokens = report["settings"].get("text_tokens")
    if tokens is None or isinstance(what, int):
        return
    longest = pipeline.check_prompt(what)
    if longest > tokens:
        raise ValueError(
            f"the FLOPs of {file} are of texts of up to {tokens} tokens, but these have "
            f"{longest}; sweep with such texts, or cap by max_ms"
        )


def in_words(costs: dict[str, float]) -> str:
    """'1.2 GFLOPs and 31 ms an image', of costs by the names of their caps."""
    pairs = ((cost, *_UNITS[name]) for name, cost in costs.items())
    return " and ".join(f"{cost / size:.4g} {unit}" for cost, size, unit in pairs) + " an image"
