"""Images that differ in nothing but their budget: from the same noise, seed by seed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from elit._devices import synchronize
from elit.pipelines.base import ElasticPipeline

What = Sequence[Any] | Mapping[str, Any]
"""Labels or texts, one for each seed; or the arguments of a pipeline that say what to draw."""


def draw_batch(pipeline: ElasticPipeline, what: What, seeds: Sequence[int], **options: Any) -> Any:
    """A batch of images, each of which depends on its own seed alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options |= {"generator": generators, "return_dict": False}
    if isinstance(what, Mapping):
        return pipeline(**what, **options)[0]
    return pipeline(what, **options)[0]


def draw_budgets(
    pipeline: ElasticPipeline,
    what: What,
    budgets: Sequence[float],
    seeds: Sequence[int],
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[tuple[list[Any], float]]:
    """Draw the same images at each budget, from the same noise.

    Args:
        pipeline: on its device.
        what: to draw; arguments, not a list, are of a single batch.
        budgets: fractions of the latents to keep.
        seeds: of each image.
        batch_size: images drawn at once; by default all.
        **options: further arguments of the pipeline.

    Yields:
        Images of a budget, and the seconds that they took.
    """
    at_once = batch_size or len(seeds)
    for budget in budgets:
        started, images = time.perf_counter(), []
        for first in range(0, len(seeds), at_once):
            part = slice(first, first + at_once)
            mine = what if isinstance(what, Mapping) else what[part]
            images += draw_batch(pipeline, mine, seeds[part], budget=budget, **options)
        synchronize(pipeline.transformer.device)
        yield images, time.perf_counter() - started
