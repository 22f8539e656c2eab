"""The sampler: from noise to samples, of any model."""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from elit.flow.guidance import UNGUIDED, Condition, Guidance, Latents, Velocity

logger = logging.getLogger(__name__)

Generators = torch.Generator | Sequence[torch.Generator] | None
AfterStep = Callable[[int, Tensor, Tensor], Tensor]
"""(step, timestep, samples after it) -> samples to go on from"""


def levels_of(scheduler: Any) -> list[float]:
    """Noise level of each call of the model in a run that was begun.

    From `sigmas`, not from `timesteps`, which some schedulers round; ours are not even in float32.
    """
    exact = getattr(scheduler, "levels", None)
    return exact[:-1] if exact else scheduler.sigmas.tolist()[: len(scheduler.timesteps)]


@torch.no_grad()
def sample(
    predict: Velocity,
    noise: Tensor,
    scheduler: Any,
    guidance: Guidance | None = None,
    latents_of_steps: Sequence[tuple[Latents, Latents]] | None = None,
    condition: Condition | None = None,
    null_condition: Condition | None = None,
    generator: Generators = None,
    after_step: AfterStep | None = None,
    mixes: bool = False,
) -> Tensor:
    """Samples (B, ...) of noise (B, ...), in its dtype.

    Args:
        predict: the model.
        noise: samples at the scheduler's first level.
        scheduler: one that `start_sampling` began a run of, before each call.
        guidance: None is no guidance.
        latents_of_steps: latents per group of the prediction and of its guide, for each call of
            the scheduler; by default all.
        condition: what to draw.
        null_condition: the same of nothing in particular, for guidance.
        generator: of a scheduler that adds noise: one for each sample, or one for all.
        after_step: called after each step.
        mixes: whether the model takes samples of different budgets in one batch.
    """
    levels, guidance = levels_of(scheduler), guidance or UNGUIDED
    latents = [(None, None)] * len(levels) if latents_of_steps is None else latents_of_steps
    if len(latents) != len(levels):
        raise ValueError(
            f"{len(latents)} pairs in latents_of_steps for {len(levels)} calls of the model; give "
            f"one for each"
        )
    if guidance.scale != 1 and not any(map(guidance.is_active, levels)):
        logger.warning("guidance has no effect: %s is active at none of the levels", guidance)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    condition, null_condition = condition or {}, null_condition or {}
    missing = condition.keys() - null_condition.keys()
    if missing and guidance.drop_label and guidance.scale != 1:
        raise ValueError(
            f"null_condition lacks {', '.join(sorted(missing))}, by which {guidance} guides; give "
            f"the same names as in condition"
        )
    x = noise
    steps = zip(levels, scheduler.timesteps, latents, strict=True)
    for i, (sigma, timestep, (kept, guide)) in enumerate(steps):
        velocity = guidance.velocity(
            predict, x, sigma, condition, null_condition, kept, guide, mixes
        )
        velocity = velocity.to(x.dtype)  # a float64 model doesn't widen the samples
        x = scheduler.step(velocity, timestep, x, **extra, return_dict=False)[0]
        if after_step is not None:
            x = after_step(i, timestep, x)
    return x
